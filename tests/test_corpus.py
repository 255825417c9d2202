"""Training text and frozen prompts: repeatable, correct where it can be checked, and disjoint from each other."""

import ast
import doctest
import itertools
import random
import re
from fractions import Fraction
from html.parser import HTMLParser

import pytest

from mimo_jax.chat_template import ChatTemplate, default_chat_template
from mimo_jax.evaluation import prompts
from mimo_jax.training.corpus import edits, functions, library, mixture, request_pattern, web

GENERATED = tuple(source for source in mixture.SOURCES if source != "library")
VOID = {"meta", "input", "br", "hr", "img", "link"}


def samples(source, count):
    return [mixture.document(1, i, {source: 1.0}) for i in range(count)]


def found(value):
    assert value is not None
    return value


def requests(document):
    return [message["content"] for message in document.messages if message["role"] == "user"]


def answers(document):
    return [message["content"] for message in document.messages if message["role"] == "assistant"]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# --- the stream ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", GENERATED)
def test_same_seed_same_document(source):
    assert samples(source, 30) == samples(source, 30)
    texts = [str(document) for document in samples(source, 100)]
    assert len(set(texts)) > 90


def test_every_position_of_the_stream_can_be_produced_alone():
    head = list(itertools.islice(mixture.documents(seed=5), 40))
    assert [mixture.document(5, index) for index in (39, 0, 17)] == [head[39], head[0], head[17]]
    assert head != list(itertools.islice(mixture.documents(seed=6), 40))
    assert {document.scenario for document in head} == {*prompts.SCENARIOS, "drills"}


def test_weights_choose_sources():
    chosen = list(itertools.islice(mixture.documents({"math": 1.0, "web": 0.0}), 20))
    assert {document.scenario for document in chosen} == {"math"}
    with pytest.raises(ValueError, match="no such source: poems"):
        mixture.document(0, 0, {"poems": 1.0})
    with pytest.raises(ValueError, match="above 0"):
        mixture.document(0, 0, {"math": 0.0})


@pytest.mark.parametrize("source", GENERATED)
def test_held_out_documents_are_others(source):
    held_out = mixture.held_out(source, 20)
    assert len(held_out) == 20
    assert held_out == mixture.held_out(source, 20) != mixture.held_out(source, 20, seed=1)
    trained = {requests(document)[0] for document in samples(source, 1000)}
    assert trained.isdisjoint(requests(document)[0] for document in held_out)
    with pytest.raises(ValueError, match="no such source"):
        mixture.held_out("poems", 1)


def test_conversations_render_and_have_a_sensible_size():
    template = ChatTemplate(default_chat_template())
    sizes = {}
    for source in GENERATED:
        rendered = [document.render(template) for document in samples(source, 100)]
        assert all(text.endswith("<|im_end|>") and text.isascii() for text in rendered)
        assert max(map(len, rendered)) < 5000
        sizes[source] = sum(map(len, rendered)) / len(rendered)
    assert 250 < min(sizes.values()) < max(sizes.values()) < 2500


@pytest.mark.parametrize("source", GENERATED)
def test_turns_alternate_and_no_field_is_left_open(source):
    for document in samples(source, 200):
        assert document.scenario == source
        roles = [message["role"] for message in document.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for message in document.messages:
            assert message["content"].strip() == message["content"] != ""
        if source in ("math", "chat"):
            assert not re.search(r"[{}]", str([message["content"] for message in document.messages]))


# --- each scenario's own truth --------------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Fails at a closing tag that does not match the last open one."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.identifiers = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.identifiers += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_are_balanced_html():
    for document in samples("web", 200):
        (html,) = blocks(answers(document)[0], "html")
        parser = Balance()
        parser.feed(html)
        parser.close()
        assert not parser.open
        assert len(set(parser.identifiers)) == len(parser.identifiers)
        links = re.findall(r'href="#([^"]*)"', html)
        assert set(links) <= set(parser.identifiers)
        if html.startswith("<!DOCTYPE"):
            assert {"head", "title", "header", "main", "footer"} <= set(parser.seen)


def value_of(expression):
    """The value of an arithmetic expression of whole numbers, with exact division."""
    tree = ast.parse(re.sub(r"\d+", lambda number: f"F({number.group()})", expression.strip()), mode="eval")
    return eval(compile(tree, "step", "eval"), {"F": Fraction})


def test_every_step_of_a_solution_holds_and_leads_to_the_answer():
    chains = equations = sums = 0
    for document in samples("math", 400):
        for request, answer in zip(requests(document), answers(document), strict=True):
            body, result = answer.split("\n\nAnswer: ")
            assert re.fullmatch(r"-?\d+", result)
            results = set()
            for chain in re.findall(r"[-\d(][-\d\s+*/()]*(?:= ?[-\d(][-\d\s+*/()]*)+", body):
                values = [value_of(side) for side in chain.split("=")]
                assert len(set(values)) == 1, chain
                assert len(values) > 1
                results.add(values[0])
                chains += 1
            assert Fraction(result) in results or f"is {result}." in body or f"/ {result} =" in body, answer
            if equation := re.search(r"(\d*)\(?([xyzn])\b.* = .*", request):
                letter = equation.group(2)
                left, right = found(re.search(r"[\d(][^:]* = [^?]*", request)).group().split(" = ")
                sides = [
                    re.sub(rf"(\d+){letter}", r"\1*L", side).replace("(" + letter, "*(L") for side in (left, right)
                ]
                one, other = (value_of(side.replace("L", f"({result})")) for side in sides)
                assert one == other
                equations += 1
            elif plain := re.search(r"(?:What is|Calculate|Work out) ([-\d\s+*/()]+)(?:\?|\.| step)", request):
                assert value_of(plain.group(1)) == int(result)
                sums += 1
    assert chains > 800
    assert equations > 20
    assert sums > 20


def test_functions_pass_their_own_examples():
    examples = 0
    for document in samples("code", 200):
        (code,) = blocks(answers(document)[0], "python")
        space = {}
        exec(code, space)
        name = found(re.search(r"def (\w+)", code)).group(1)
        runner = doctest.DocTestRunner(verbose=False)
        for test in doctest.DocTestFinder().find(space[name], name, globs=space):
            runner.run(test)
        assert runner.failures == 0
        assert name in requests(document)[0]
        examples += runner.tries
        for answer in answers(document)[1:]:
            call, result = found(re.fullmatch(r"`(.*)` returns `(.*)`\.", answer)).groups()
            assert repr(eval(call, space)) == result
    assert examples > 350


# what functions with such names must return, written down once more by other means
INDEPENDENT = {
    r"count_divisible_by_(\d+)": lambda k, xs: len([n for n in xs if not n % k]),
    r"sum_above_(\d+)": lambda k, xs: sum(filter(lambda n: n > k, xs)),
    r"keep_below_(\d+)": lambda k, xs: list(filter(lambda n: n < k, xs)),
    r"drop_divisible_by_(\d+)": lambda k, xs: [n for n in xs if n % k],
    r"all_times_(\d+)": lambda k, xs: [k * n for n in xs],
    r"all_above_(\d+)": lambda k, xs: min(xs) > k,
    r"has_below_(\d+)": lambda k, xs: min(xs) < k,
    r"power_of_(\d+)": lambda k, n: k**n,
    r"round_up_to_(\d+)": lambda k, n: -(-n // k) * k,
    r"steps_to_zero_by_(\d+)": lambda k, n: n // k,
    r"sum_to_times_(\d+)": lambda k, n: k * n * (n + 1) // 2,
}


def test_functions_do_what_their_name_says():
    met = set()
    for i in range(3000):
        function = functions.draw(random.Random(i))
        for pattern, expected in INDEPENDENT.items():
            if match := re.fullmatch(pattern, function.name):
                space = {}
                exec(functions.plain_source(function), space)
                (argument,) = function.draw(random.Random(i))
                assert space[function.name](argument) == expected(int(match.group(1)), argument)
                met.add(pattern)
    assert met == set(INDEPENDENT)


def applied(before, patch):
    """A file after a unified diff; every line of the diff must fit."""
    old, new, at = before.splitlines(), [], 0
    for line in patch.splitlines()[2:]:
        if hunk := re.match(r"@@ -(\d+)(?:,(\d+))? \+(\d+)", line):
            start = int(hunk.group(1)) - (hunk.group(2) != "0")
            new += old[at:start]
            at = start
            assert len(new) == int(hunk.group(3)) - 1
        elif line[0] == "+":
            new.append(line[1:])
        else:
            assert old[at] == line[1:]
            new += [line[1:]] if line[0] == " " else []
            at += 1
    return "\n".join(new + old[at:]) + "\n"


def test_diffs_lead_to_the_edited_file():
    diffs = 0
    for i in range(300):
        edit, document = edits.draw(random.Random(i)), edits.generate(random.Random(i))
        request, first = requests(document)[0], answers(document)[0]
        assert edit.before in request
        if patch := blocks(first, "diff"):
            assert patch[0].startswith(f"--- a/{edit.path}\n+++ b/{edit.path}\n@@")
            assert applied(edit.before, patch[0]) == edit.after
            diffs += 1
        else:
            assert blocks(first, edit.language) == [edit.after]
        for whole in answers(document)[1:]:
            assert blocks(whole, edit.language) == [edit.after]
        if edit.language == "python":
            ast.parse(edit.before)
            ast.parse(edit.after)
    assert diffs > 150


def test_repaired_functions_are_the_right_ones():
    repaired = 0
    for i in range(400):
        edit = edits.draw(random.Random(i))
        if "has a bug" in edit.template:
            assert edit.before.splitlines()[0].startswith("def ")
            assert edit.values["name"] in edit.after
            changed = [
                pair for pair in zip(edit.before.split("\n"), edit.after.split("\n"), strict=True) if len(set(pair)) > 1
            ]
            assert len(changed) == 1
            repaired += 1
    assert repaired > 10


# --- Python's own library -------------------------------------------------------------------------------------------


def test_library_documents_are_documented_code():
    texts = [found(document.text) for document in itertools.islice(library.documents(), 300)]
    assert texts == [found(document.text) for document in itertools.islice(library.documents(), 300)]
    for text in texts:
        assert library.SMALLEST <= len(text) <= library.LARGEST
        (node,) = ast.parse(text).body
        assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(node)


def test_library_keeps_some_documents_for_evaluation():
    trained = {found(library.generate(random.Random(i))).text for i in range(30)}
    reserved = [document.text for document in mixture.held_out("library", 4)]
    assert len(reserved) == 4
    assert trained.isdisjoint(reserved)


def test_a_library_without_sources_is_empty(tmp_path, monkeypatch):
    assert list(library.documents(tmp_path)) == []
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text('def f():\n    """' + "word " * 100 + '"""\n')
    (tmp_path / "good.py").write_text('def g():\n    """' + "word " * 100 + '"""\n')
    assert [found(document.text).split("(")[0] for document in library.documents(tmp_path)] == ["def g"]
    monkeypatch.setattr(library, "_modules_by_size", lambda: ((), ()))
    assert library.generate(random.Random(0)) is None
    assert mixture.document(0, 0, {"library": 1.0}).messages
    assert mixture.held_out("library", 3) == []


# --- frozen prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", GENERATED)
def test_templates_describe_every_training_request(source):
    patterns = [request_pattern(template) for template in mixture.TEMPLATES[source]]
    for document in samples(source, 300):
        for request in requests(document):
            assert any(pattern.fullmatch(request) for pattern in patterns), request


def test_no_frozen_prompt_fits_a_training_template():
    patterns = [request_pattern(template) for templates in mixture.TEMPLATES.values() for template in templates]
    for scenario in prompts.SCENARIOS:
        for prompt in prompts.load(scenario):
            for message in prompt.messages:
                if message["role"] == "user":
                    assert not any(pattern.fullmatch(message["content"]) for pattern in patterns), prompt.id


def test_frozen_prompts_are_about_other_things():
    trained = {functions.draw(random.Random(i)).name for i in range(5000)}
    for prompt in prompts.load("code"):
        assert prompt.check[0][0].split("(")[0] not in trained
    assert not set(web.HELD_OUT_BUSINESSES) & set(web.BUSINESSES)
    text = " ".join(request for document in samples("web", 300) for request in requests(document))
    assert not [kind for kind in web.HELD_OUT_BUSINESSES if re.search(rf"\b{kind}\b", text)]
    asked = " ".join(prompt.messages[0]["content"] for prompt in prompts.load("web"))
    assert all(kind in asked for kind in web.HELD_OUT_BUSINESSES)


def test_frozen_prompts_are_whole():
    identifiers = []
    for scenario in prompts.SCENARIOS:
        loaded = prompts.load(scenario)
        assert len(loaded) >= 20
        identifiers += [prompt.id for prompt in loaded]
        for prompt in loaded:
            assert prompt.id.startswith(f"{scenario}-")
            roles = [message["role"] for message in prompt.messages]
            assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
            assert roles[-1] == "user"
            assert (prompt.answer is not None) == (scenario in ("math", "edits"))
            assert bool(prompt.check) == (scenario == "code")
            assert scenario != "math" or re.fullmatch(r"\d+", found(prompt.answer))
            for call, result in prompt.check:
                ast.parse(call)
                assert call.split("(")[0] in prompt.messages[0]["content"]
                assert repr(ast.literal_eval(result)) == result
    assert len(set(identifiers)) == len(identifiers)
    with pytest.raises(ValueError, match="no such scenario"):
        prompts.load("poems")
