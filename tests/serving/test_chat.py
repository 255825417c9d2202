"""The chat client: its conversation over a real server, and the command in pipes and in a terminal."""

import asyncio
import os
import pty
import signal
import sys
from contextlib import closing, suppress

import grpc
import pytest

from serve import chat
from serve.chat_client import Conversation, ServerError, Turn, connected
from serve.generation import Status
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.services.security import KeyInterceptor
from tests.conftest import REPOSITORY
from tests.serving.text_server import TextEngine, byte_tokenizer, says, serving

THOUGHT = "<think>hm</think>\n\nIt is late."


def prompts(engine):
    """What the engine was asked, as text."""
    return [byte_tokenizer().decode(r.prompt_ids, skip_special=False) for r in engine.seen]


async def run(address, *arguments):
    return await asyncio.to_thread(chat.main, ["--address", address, *arguments])


def typed(monkeypatch, *lines):
    """Lines that a person types, and then ctrl-D; an exception among them is raised."""
    left = iter(lines)

    def answer(prompt=""):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)


async def test_one_answer(capsys):
    async with serving(TextEngine(says(THOUGHT))) as served:
        flags = ["--system", "Be brief.", "--seed", "7", "--temperature", "0.5", "--max-new-tokens", "100"]
        assert await run(served.address, "--prompt", "What time is it?", *flags) == 0
        out, err = capsys.readouterr()
        assert out == "\n\nIt is late.\n"
        assert "hm" in err
        assert "tokens/s" in err
        assert "accepted length" in err
        sampling = served.engine.seen[0].sampling
        assert (sampling.seed, sampling.temperature, sampling.max_new_tokens) == (7, 0.5, 100)
        assert prompts(served.engine)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
        assert await run(served.address, "--prompt", "?", "--no-thinking", "--max-new-tokens", "2") == 0
        assert prompts(served.engine)[1].endswith("<think></think>")
        assert "longest" in capsys.readouterr().err


async def test_a_conversation(capsys, monkeypatch):
    async with serving(TextEngine(says(THOUGHT))) as served:
        typed(
            monkeypatch,
            "one",
            "/seed 5",
            KeyboardInterrupt(),
            "",
            "two",
            "/seed",
            "/seed x",
            "/system Be kind.",
            "/nonsense",
            "/reset",
            "three\ud800",
            "/exit",
            "never",
        )
        assert await run(served.address) == 0
        first, second, third = prompts(served.engine)
        turn = "<|im_start|>user\none<|im_end|><|im_start|>assistant\n"
        assert first.endswith(turn)
        assert second == f"{first}{THOUGHT}<|im_end|>{turn.replace('one', 'two')}"
        assert third.startswith("<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\nthree?<|im_end|>")
        assert served.engine.seen[1].sampling.seed == 5
        assert served.engine.seen[2].sampling.seed != 5
        out = capsys.readouterr().out
        assert "scripted at" in out
        assert "hm\n\nIt is late.\n" in out
        assert "no command /nonsense" in out
        assert "not 'x'" in out


async def test_refusals_do_not_end_a_conversation(capsys, monkeypatch):
    engine = TextEngine(says("yes"), context_length=200)
    async with serving(engine) as served:
        typed(monkeypatch, "x" * 300, "short")
        assert await run(served.address) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "INVALID_ARGUMENT" in out
        assert "yes" in out
        assert "xxx" not in prompts(engine)[0]


async def test_a_terminal_is_given_no_orders(capsys, monkeypatch):
    async with serving(TextEngine(says("a\x1b[2Jb\r\x07[bold]c"))) as served:
        typed(monkeypatch, "?")
        assert await run(served.address) == 0
        assert "a\ufffd[2Jb\ufffd\ufffd[bold]c" in capsys.readouterr().out


async def test_without_a_server(capsys, address):
    assert await run(address, "--connect-timeout", "0.3") == 2
    assert f"no gRPC server answers at {address} within 0.3 s" in capsys.readouterr().err


async def test_a_server_that_is_not_ready(capsys):
    engine = TextEngine()
    engine.status = Status.STARTING
    async with serving(engine) as served:
        assert await run(served.address, "--prompt", "?") == 2
        assert "UNAVAILABLE: the server is starting" in capsys.readouterr().err


async def test_a_server_of_another_kind(capsys):
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert await run(f"127.0.0.1:{port}") == 2
    assert "UNIMPLEMENTED" in capsys.readouterr().err
    await server.stop(0)


async def test_keys(capsys, monkeypatch):
    server = grpc.aio.server(interceptors=[KeyInterceptor("secret", None, ())])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert await run(f"127.0.0.1:{port}", "--prompt", "?") == 2
    assert "UNAUTHENTICATED" in capsys.readouterr().err
    assert await run(f"127.0.0.1:{port}", "--prompt", "?", "--api-key", "secret") == 2
    assert "UNIMPLEMENTED" in capsys.readouterr().err  # let in, where there is nothing
    await server.stop(0)


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--connect-timeout", "0"], ["--max-new-tokens", "x"]])
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        chat.main(flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


async def test_tls_needs_a_file_of_authorities(capsys, tmp_path, address):
    assert await run(address, "--ca-file", str(tmp_path / "none.pem")) == 2
    assert "none.pem" in capsys.readouterr().err


class TestConversation:
    async def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(self):
        async with serving(TextEngine(says("<think></think>" + "a" * 500, 1), seconds=0.005)) as served:

            def ask():
                with connected(served.address, api_key=None, ca_file=None, timeout=5) as server:
                    conversation, turn = Conversation(server, pb.Sampling()), Turn()
                    with closing(conversation.ask("?", turn)) as pieces:
                        for _ in pieces:
                            if len(turn.text) > 3:
                                break
                    return conversation, turn

            conversation, turn = await asyncio.to_thread(ask)
            await served.settle()
            assert turn.end is None
            assert 3 < len(turn.text) < 500
            assert [m.content for m in conversation.messages] == ["?", turn.text]

    async def test_a_refused_question_is_not_part_of_it(self):
        async with serving(TextEngine(context_length=10)) as served:

            def ask():
                with connected(served.address, api_key=None, ca_file=None, timeout=5) as server:
                    conversation = Conversation(server, pb.Sampling())
                    with pytest.raises(ServerError, match="context of 10"):
                        list(conversation.ask("a long question", Turn()))
                    return conversation

            assert (await asyncio.to_thread(ask)).messages == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
async def test_ctrl_c_in_a_terminal_ends_the_answer_and_not_the_chat():
    engine = TextEngine(says("<think></think>" + "word " * 2000, 1), seconds=0.01)
    async with serving(engine) as served:
        leader, follower = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serve.chat",
            "--address",
            served.address,
            cwd=REPOSITORY,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(follower)
        os.set_blocking(leader, False)
        seen = bytearray()

        async def until(words: bytes) -> None:
            while words not in seen:
                with suppress(BlockingIOError):
                    seen.extend(os.read(leader, 4096))
                await asyncio.sleep(0.01)

        async with asyncio.timeout(30):
            await until(b"> ")
            os.write(leader, b"go\n")
            await until(b"word")
            process.send_signal(signal.SIGINT)
            await until(b"(broken off)")
            await served.settle()
            engine.script = says("<think></think>fine")
            os.write(leader, b"again\n")
            await until(b"accepted length")
            os.write(leader, b"/exit\n")
            assert await process.wait() == 0
        os.close(leader)
        assert b"fine" in seen
        assert "word" in prompts(engine)[1]
