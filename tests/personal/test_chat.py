"""Asking a client's model: drawn answers, pieces as they come, several turns, several clients side by side."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedalt.data.federation import Row
from fedalt.evaluation.generate import Sampling
from fedalt.personal.chat import Chat, Manner
from fedalt.personal.export import export_merged
from micro import answers, call, finished, model_folder, refused, settings, write_yaml

ASKED = "Is 3 more than 1? (1.4)"


def chat(run: Path | None = None, client: int = 1, **manner: Any) -> Chat:
    return Chat(run or finished(), client, manner=Manner(**manner))


@pytest.mark.parametrize("beams", [1, 2])
def test_pieces_add_up_to_the_answer_that_is_given_without_them(beams: int) -> None:
    run = finished(evaluation__num_beams=beams) if beams > 1 else finished()
    mine, pieces = chat(run), list[str]()
    for line in answers(run, 3, [1]):
        assert mine.ask(line["text"], pieces.append).text == line["answer"]
        assert "".join(pieces).strip() == (line["answer"] if mine.streams else "")
        pieces.clear()
    assert mine.streams is (beams == 1)


@pytest.mark.parametrize("method", ["fedalt", "fedit", "pf2lora"])
def test_the_base_alone_answers_as_if_there_were_no_adapters(method: str) -> None:
    mine = chat(finished(method), max_new_tokens=8)
    personal = mine.ask(ASKED).text
    ids = torch.tensor([mine.encoder.prompt(ASKED)])
    alone = AutoModelForCausalLM.from_pretrained(mine.config.model.name).eval()
    written = alone.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    text = mine.resident.base.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert mine.base_alone().ask(ASKED).text == text != personal
    assert mine.ask(ASKED).text == personal, "the client's own model is what it was"


def test_a_seed_gives_the_same_answers_and_another_seed_others() -> None:
    def said(seed: int, **how: Any) -> list[str]:
        mine = chat(sampling=Sampling(seed=seed, **how), max_new_tokens=8)
        return [mine.ask(ASKED).text for _ in range(3)]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    hot = said(1, temperature=3.0)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's draws change"
    assert hot == said(1, temperature=3.0) != said(2, temperature=3.0)
    assert len(set(hot)) > 1, "each question has draws of its own"
    greedy = chat(max_new_tokens=8).ask(ASKED).text
    assert set(said(1, temperature=3.0, top_p=1e-6)) == {greedy}


def test_drawn_answers_have_the_models_own_chances(tmp_path: Path) -> None:
    """First tokens of many answers against the softmax of an exported model without a mixer, which is exact."""
    run = finished("local")
    export_merged(run, 1, tmp_path / "merged")
    mine = chat(run, max_new_tokens=1)
    ids = torch.tensor([mine.encoder.prompt(ASKED)])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        chances = (model(ids).logits[0, -1] / 2.0).softmax(-1)
    likeliest = mine.resident.base.tokenizer.decode(chances.argmax()).strip()
    drawing = chat(run, sampling=Sampling(temperature=2.0), max_new_tokens=1)
    share = sum(drawing.ask(ASKED).text == likeliest for _ in range(100)) / 100
    assert share == pytest.approx(float(chances.max()), abs=0.2)


def test_pieces_of_a_drawn_answer() -> None:
    pieces: list[str] = []
    mine = chat(sampling=Sampling(temperature=3.0), max_new_tokens=8)
    assert mine.ask(ASKED, pieces.append).text == "".join(pieces).strip()


@cache
def talkative() -> Path:
    """A run with a chat template."""
    folder = finished().parent / "talkative"
    model = model_folder(folder / "model")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    )
    values = settings(folder / "run", model, data__template="chat", federation__rounds=1)
    assert call("run", write_yaml(folder / "x.yaml", values)).code == 0
    return folder / "run"


@pytest.mark.parametrize("template", ["chat", "alpaca_short"])
def test_turns_are_read_as_rows_of_conversations_are(template: str) -> None:
    run = talkative() if template == "chat" else finished()
    mine, alone = chat(run, turns=True), chat(run)
    first = mine.ask(ASKED).text
    assert first == alone.ask(ASKED).text
    second = mine.ask("Say 3 4.").text
    said = (("user", ASKED), ("assistant", first), ("user", "Say 3 4."))
    assert mine.said == (*said, ("assistant", second))
    mine.encoder.cutoff = 500  # of training rows
    row = mine.encoder.example(Row("", "x", turns=said))
    assert row and row.prompt == mine.encoder.prompt(said) != mine.encoder.prompt("Say 3 4.")


def test_the_oldest_turns_are_forgotten_where_there_is_no_room() -> None:
    mine = chat(turns=True)
    for _ in range(12):
        mine.ask("x " * 30)
    assert 2 <= len(mine.said) < 24
    assert mine.said[0][0] == "user"


def test_clients_side_by_side() -> None:
    line = next(one for one in answers(finished(), 3, [0]))
    alone = [call("generate", finished(), "--client", c, line["text"]).out.strip() for c in (0, 2)]
    done = call("generate", finished(), "--compare", "0,2", line["text"])
    assert done.code == 0, done.err
    assert "client 0" in done.out and "client 2" in done.out and "client 1" not in done.out
    cells = [cell.strip() for cell in done.out.splitlines()[3].strip("│").split("│")]
    assert cells == alone
    loop = call("generate", finished(), "--compare", "0,2", stdin=f"{line['text']}\n{line['text']}\n")
    assert loop.out.count("client 0") == 2


def test_the_command_draws_lengthens_and_remembers() -> None:
    greedy = call("generate", finished(), "--client", 1, ASKED).out
    assert call("generate", finished(), "--client", 1, "--temperature", 0, ASKED).out == greedy
    hot = ("generate", finished(), "--client", 1, "--temperature", 3, "--max-new-tokens", 12, "--seed")
    assert call(*hot, 1, ASKED).out == call(*hot, 1, ASKED).out != call(*hot, 2, ASKED).out
    twice = call("generate", finished(), "--client", 1, "--turns", stdin=f"{ASKED}\nSay 3 4.\n")
    assert twice.code == 0 and len(twice.out.replace("> ", "").split("\n")) >= 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give --client N, or --compare N,M"),
        (["--client", 1, "--compare", "0,1"], "give --client N, or --compare N,M"),
        (["--compare", "0;1"], "--compare: 0;1 is no list of clients, as in 0,3"),
        (["--compare", "0,7"], "no client 7 here"),
        (["--compare", "0,1", "--show-alpha"], "--show-alpha is for one --client"),
        (["--client", 1, "--seed", 3], "--seed is for answers that are drawn"),
        (["--client", 1, "--temperature", 0, "--top-p", 0.5], "--temperature 0 draws none"),
        (["--client", 1, "--temperature", -1], "--temperature: must be a number, at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[Any], line: str) -> None:
    assert line in refused("generate", finished(), *arguments, "x")
