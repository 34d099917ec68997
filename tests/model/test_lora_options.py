"""LoRA options of PEFT: where adapters are, how they start and scale, and a PEFT adapter that is there beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fedalt.config import RunConfig, parse_config
from fedalt.errors import UserError
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import initial_state
from fedalt.names import A, B
from fedalt.runs.setup import prepare
from micro import call, finished, run_here, settings, shared_model
from support import examples, llama, method_of, relative, run_rounds, shape_of, training

QUICK: dict[str, Any] = {"training__local_epochs": 1, "federation__rounds": 1, "evaluation__max_new_tokens": 2}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def ids() -> torch.Tensor:
    return torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))


def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(shared_model(), dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids()).logits
    return found


def ours(values: dict[str, Any], run: Path, client: int) -> torch.Tensor:
    """A client's logits by fedalt itself."""
    from fedalt.model.batch_layout import BatchLayout
    from fedalt.runs.client_folder import read_client
    from fedalt.runs.folder import RunFolder

    resident = prepare(parse_config(values, "x")).resident
    personal = read_client(RunFolder(run), client, resident.base)
    resident.model.load([personal.state], personal.placement)
    with torch.no_grad(), resident.model.rows(BatchLayout((3,))):
        found: torch.Tensor = resident.model.base(input_ids=ids()).logits
    return found


def adapter(folder: Path, **options: Any) -> Path:
    """A LoRA that PEFT has written, and that does something."""
    torch.manual_seed(5)
    config = LoraConfig(r=options.pop("r", 4), lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(plain(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


# ----------------------------------------------------------------------------------------------------- where they are


@pytest.mark.parametrize(
    ("settings_", "kept"),
    [
        ({"targets": "all-linear", "layers": "1"}, lambda p: ".layers.1." in p),
        ({"targets": "all-linear", "exclude": "q_proj,lm_head"}, None),
        (
            {"targets": "all-linear", "exclude": ["model.layers.0.mlp.up_proj"]},
            lambda p: p != "model.layers.0.mlp.up_proj",
        ),
        (
            {"targets": "up_proj,down_proj,q_proj", "layers": [0], "exclude": "q_proj"},
            lambda p: p.startswith("model.layers.0.mlp") and "gate" not in p,
        ),
        ({"layers": [0, 1]}, lambda p: p.endswith(("q_proj", "v_proj"))),
    ],
)
def test_targets_blocks_and_exclusions(settings_: dict[str, Any], kept: Any) -> None:
    lora = parse_config({"lora": settings_}, "x").lora
    every = set(AdaptedModel(llama(), targets=["all-linear"]).layers)
    if kept is None:
        with pytest.raises(UserError, match=r'lora\.exclude: "lm_head" is none of the targets'):
            AdaptedModel(llama(), targets=lora.targets, layers=lora.layers, exclude=lora.exclude)
        return
    found = AdaptedModel(llama(), targets=lora.targets, layers=lora.layers, exclude=lora.exclude).layers
    assert set(found) == {path for path in every if kept(path)} and found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [2]}, "lora.layers: no block 2; blocks 0 to 1 have targets"),
        ({"exclude": ["q_porj"]}, 'lora.exclude: "q_porj" is none of the targets (did you mean "q_proj"?)'),
        ({"exclude": ["q_proj", "v_proj"]}, "lora.exclude: no target is left"),
    ],
)
def test_what_leaves_nothing_or_is_not_there_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        AdaptedModel(llama(), **options)
    assert str(caught.value) == said


# ------------------------------------------------------------------------------------------------------- how they scale


@pytest.mark.parametrize("name", ["fedalt", "fedit_split", "pf2lora", "flora"])
def test_rslora_scales_by_the_root_of_the_rank(name: str) -> None:
    usual, stable = (method_of(name, lora__r=4, lora__rslora=flag) for flag in (False, True))
    assert stable.scale == pytest.approx(2 * usual.scale)


def test_own_scales_of_smaller_loras_follow() -> None:
    own = method_of(
        "pf2lora", lora__r=16, lora__rslora=True, pf2lora__private_rank=4, pf2lora__private_scale="own_rank"
    )
    alpha = own.config.lora.alpha
    assert own.mixing.weights[1] * own.scale == pytest.approx(alpha / 2)
    parts = method_of("fedit_split", lora__r=8, lora__rslora=True, fedit_split__scaling="part")
    assert parts.scale == pytest.approx(parts.config.lora.alpha / 2), "two parts of rank 4"


OPTIONS: dict[str, Any] = {
    "lora__rslora": True,
    "lora__targets": "all-linear",
    "lora__layers": [1],
    "lora__exclude": ["o_proj"],
    "lora__distribution": "gaussian",
    "lora__r": 3,
}


@pytest.mark.parametrize("static", [False, True])
def test_exports_give_the_same_logits_in_plain_peft(static: bool, tmp_path: Path) -> None:
    values = settings(tmp_path / "run", method="local", **QUICK | OPTIONS)
    run_here(values)
    flag = ("--static",) if static else ()
    assert call("export", tmp_path / "run", "--client", 1, "--out", tmp_path / "out", *flag).code == 0
    folder = tmp_path / "out" / ("" if static else "individual")
    about = json.loads((folder / "adapter_config.json").read_text())
    if not static:
        assert (about["use_rslora"], about["lora_alpha"], about["r"]) == (True, 16, 3)
    assert {t.split("layers.")[1] for t in about["target_modules"]} == {
        f"1.{name}" for name in (*MLP, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    }
    theirs = logits(PeftModel.from_pretrained(plain(), str(folder)).eval())
    assert relative(theirs, ours(values, tmp_path / "run", 1)) < 1e-5 < relative(theirs, logits(plain()))


# ---------------------------------------------------------------------------------------------------- how they start


def test_a_gaussian_start_is_pefts() -> None:
    method = method_of("fedalt", lora__r=8)
    shape = shape_of(method, {"m": (4096, 16)})
    usual, normal = (initial_state(shape, 0, 3, "shared", "kaiming", distribution=d) for d in ("uniform", "gaussian"))
    a = next(value for key, value in normal.tensors.items() if key.factor == A)
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.02) and float(a.abs().max()) > 3 / 8
    others = [key for key in normal.tensors if key.factor != A]
    assert all(torch.equal(normal.tensors[key], usual.tensors[key]) for key in others)


def test_floras_new_loras_start_so_too() -> None:
    rows = {client: examples(5, client) for client in range(2)}
    method = method_of("flora", 2, lora__distribution="gaussian", lora__r=2)
    model = AdaptedModel(llama())
    history, server = run_rounds(model, method, rows, training(local_epochs=1), 1)
    state = method.receive(history[0][0].state, server.messages((0, 1))[0])
    values = torch.cat([v.flatten() for k, v in state.tensors.items() if k.factor == A])
    assert float(values.std()) == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora__use_dora", "DoRA is not supported"),
        ("lora__dora", "DoRA is not supported"),
        ("lora__use_rslora", 'did you mean "lora.rslora"'),
        ("lora__layers_to_transform", 'did you mean "lora.layers"'),
    ],
)
def test_names_of_others_are_answered(key: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(settings(tmp_path, **{key: True}), "x")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_gaussian_is_no_answer_to_who_starts_alike(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.distribution=gaussian"):
        parse_config(settings(tmp_path, lora__init="gaussian"), "x")


# ------------------------------------------------------------------------------------------------ an adapter beforehand


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_is_merged_into_the_base_before_the_first_round(options: dict[str, Any], tmp_path: Path) -> None:
    given = adapter(tmp_path / "given", r=3, **options)
    values = settings(tmp_path / "run", method="local", model__adapter=str(given), **QUICK)
    run_here(values)
    assert call("export", tmp_path / "run", "--client", 0, "--out", tmp_path / "out").code == 0
    first = PeftModel.from_pretrained(plain(), str(tmp_path / "out/merged_first")).merge_and_unload()
    both = PeftModel.from_pretrained(first, str(tmp_path / "out/individual")).eval()
    assert relative(logits(both), ours(values, tmp_path / "run", 0)) < 1e-5
    without = PeftModel.from_pretrained(plain(), str(tmp_path / "out/individual")).eval()
    assert relative(logits(without), logits(both)) > 1e-3
    with pytest.raises(UserError, match="made for another base model"):
        ours({**values, "model": {"name": str(shared_model())}}, tmp_path / "run", 0)


@pytest.mark.parametrize("method", ["fedalt", "fedit", "local"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_everybody_starts_from_an_adapter(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    given = adapter(tmp_path / "given", **options)
    values = settings(tmp_path / "run", method=method, model__adapter=str(given), model__adapter_as="start")
    experiment = prepare(parse_config(values, "x"))
    slot = experiment.method.slot_names[0]
    peft = PeftModel.from_pretrained(plain(), str(given))
    for client in range(3):
        state = experiment.initial_state(client)
        for path in experiment.method.layers:
            a, b = (
                next(v for k, v in state.tensors.items() if (k.module, k.slot, k.factor) == (path, slot, f))
                for f in (A, B)
            )
            layer = peft.base_model.model.get_submodule(path)
            torch.testing.assert_close(experiment.method.scale * b @ a, layer.get_delta_weight("default").detach())
    assert experiment.info.base != experiment.resident.base.sha256, "another run than without"


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {"r": 2}, "has rank 2, which is not 4 of individual; set lora.r=2"),
        ({"lora__targets": "q_proj"}, {}, "adapts model.layers.0.self_attn.v_proj, which is no target here"),
        ({}, {"use_dora": True}, "is a DoRA"),
        ({}, {"rank_pattern": {"q_proj": 2}}, "is no plain LoRA (rank_pattern"),
        ({"lora__ranks": [2, 4, 4], "method": "hetlora"}, {}, "clients' own ranks"),
    ],
)
def test_an_adapter_that_cannot_be_a_start_is_refused(
    changes: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = adapter(tmp_path / "given", **options)
    values = settings(tmp_path / "run", model__adapter=str(given), model__adapter_as="start", **changes)
    with pytest.raises(UserError) as caught:
        prepare(parse_config(values, "x"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_adapter_and_one_of_another_model_are_one_line(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", model__adapter=str(tmp_path))
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        prepare(parse_config(values, "x"))
    odd = get_peft_model(
        AutoModelForCausalLM.from_pretrained(shared_model("gpt2")), LoraConfig(target_modules=["c_attn"])
    )
    odd.save_pretrained(str(tmp_path / "odd"))
    with pytest.raises(UserError, match="cannot be merged into"):
        prepare(parse_config(settings(tmp_path / "run", model__adapter=str(tmp_path / "odd")), "x"))
    with pytest.raises(UserError, match=r"no model\.adapter is given"):
        prepare(parse_config(settings(tmp_path / "run", model__adapter_as="start"), "x"))


def test_nothing_of_it_is_in_an_ordinary_run() -> None:
    assert RunConfig().lora.scale(8) == 4.0
    assert not list(finished().glob("clients/*/merged_first"))
    assert json.loads((finished() / "clients/0/individual/adapter_config.json").read_text())["use_rslora"] is False
