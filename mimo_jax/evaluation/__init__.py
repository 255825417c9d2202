"""Holding a model against another implementation, another checkpoint or a clock."""
