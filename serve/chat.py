"""`mimo-serve chat`: talk to a running server in a terminal."""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import closing, suppress

from rich.console import Console

from serve.channel import connection_arguments
from serve.chat_client import Conversation, ServerError, Turn, connected
from serve.protos.mimo.serve.v1 import generation_pb2 as pb

with suppress(ImportError):  # line editing and a history, where Python has them
    import readline  # noqa: F401

_HELP = """\
/reset        forget what was said
/system TEXT  tell the model something first; without TEXT: nothing
/seed N       make the answers repeatable; without N: not
/exit         leave, as ctrl-D does
ctrl-C breaks an answer off."""

# A terminal obeys these; a model's text is not to give it orders.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 if there is no server, or it refuses."""
    arguments = _parser().parse_args(argv)
    try:
        with connected(
            arguments.address,
            api_key=arguments.api_key,
            ca_file=arguments.ca_file,
            timeout=arguments.connect_timeout,
        ) as server:
            info = server.describe()
            thinking = False if arguments.no_thinking else None
            conversation = Conversation(server, _sampling(arguments), arguments.system, thinking)
            if arguments.prompt is not None:
                _answer_once(conversation, arguments.prompt)
            else:
                _Terminal(conversation).run(f"{info.model} at {arguments.address}; /help tells the commands")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _answer_once(conversation: Conversation, prompt: str) -> None:
    """The answer on standard output; thinking and statistics on standard error."""
    turn, errors = Turn(), Console(stderr=True)
    with closing(conversation.ask(_clean(prompt), turn)) as pieces:
        for reasoning, text in pieces:
            _show(errors, reasoning, "dim")
            print(_visible(text) if sys.stdout.isatty() else text, end="", flush=True)
    print()
    errors.print(_line(turn), style="dim", highlight=False)


class _Terminal:
    """The conversation as a person sees it."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._console = Console()

    def run(self, greeting: str) -> None:
        """Until the person leaves."""
        self._console.print(greeting, style="dim", highlight=False, markup=False)
        while True:
            try:
                said = _clean(input("> ")).strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print("\n/exit or ctrl-D leaves", style="dim", highlight=False)
                continue
            if said == "/exit":
                return
            if said.startswith("/"):
                self._console.print(self._command(said), style="dim", highlight=False, markup=False)
            elif said:
                self._answer(said)

    def _command(self, said: str) -> str:
        """Do what a command says; gives what there is to tell."""
        name, _, value = said.partition(" ")
        value = value.strip()
        sampling = self._conversation.sampling
        match name:
            case "/help":
                return _HELP
            case "/reset":
                self._conversation.messages.clear()
                return "forgotten"
            case "/system":
                self._conversation.system = value
                return "the model is told this first" if value else "the model is told nothing first"
            case "/seed" if not value:
                sampling.ClearField("seed")
                return "answers vary"
            case "/seed" if value.isdecimal() and int(value) < 1 << 32:
                sampling.seed = int(value)
                return f"seed {value}"
            case "/seed":
                return f"a seed is a whole number below 4294967296, not {value!r}"
        return f"there is no command {name}\n{_HELP}"

    def _answer(self, said: str) -> None:
        turn, console = Turn(), self._console
        thinks = False
        try:
            with closing(self._conversation.ask(said, turn)) as pieces:
                for reasoning, text in pieces:
                    _show(console, reasoning, "dim italic")
                    thinks = thinks or bool(reasoning)
                    if text:
                        _show(console, f"\n\n{text.lstrip()}" if thinks else text, "")
                        thinks = False
        except KeyboardInterrupt:
            console.print("\n(broken off)", style="yellow", highlight=False)
        except ServerError as error:
            console.print(
                f"\n{error}" if turn.text or turn.reasoning else str(error), style="red", markup=False, highlight=False
            )
        else:
            console.print()
        if turn.first is not None:
            console.print(_line(turn), style="dim", highlight=False, markup=False)


def _line(turn: Turn) -> str:
    """Statistics, and how the answer ended where that is not as it should."""
    end = turn.end
    if end and end.reason == pb.FINISH_REASON_LENGTH:
        return f"{turn.statistics} (stopped at the longest that was asked for)"
    if end and end.reason == pb.FINISH_REASON_ABORT:
        return f"{turn.statistics} (aborted: {end.message or 'no reason given'})"
    return turn.statistics


def _show(console: Console, text: str, style: str) -> None:
    if text:
        console.print(_visible(text), end="", style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _visible(text: str) -> str:
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def _clean(text: str) -> str:
    """Without halves of characters, which a terminal may give and no message can hold."""
    return text.encode(errors="replace").decode()


def _sampling(arguments: argparse.Namespace) -> pb.Sampling:
    return pb.Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def _natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"must be a whole number below 4294967296, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimo-serve chat", description="Talk to a running server. Thinking is dimmed; ctrl-C breaks an answer off."
    )
    connection_arguments(parser)
    asked = parser.add_argument_group("conversation (default: as the server does)")
    asked.add_argument("--prompt", metavar="TEXT", help="print the answer to this, and leave")
    asked.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    asked.add_argument("--no-thinking", action="store_true", help="answer at once")
    asked.add_argument("--max-new-tokens", type=_natural, metavar="N", help="of one answer")
    asked.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    asked.add_argument("--top-p", type=float, metavar="P")
    asked.add_argument("--seed", type=_natural, metavar="N", help="same seed, same conversation: same answers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
