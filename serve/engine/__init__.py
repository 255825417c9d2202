"""Between requests and the device: queue, pages, prefix cache, steps. Plain Python but for `executor.py`."""
