import json
import re

import pytest
import torch
from adapters import CONFIG, WEIGHTS, Q, assert_same_state, change_config, change_weights, state_of
from safetensors.torch import load_file

from colfolio.errors import CheckpointError
from colfolio.models import Retriever
from colfolio.models.adapters import load_adapter
from colfolio.models.checkpoint import cast_parameters


def rename_key(folder):
    def edit(weights):
        weights[f"base_model.model.{Q}x.lora_A.weight"] = weights.pop(
            f"base_model.model.{Q}.lora_A.weight"
        )

    change_weights(folder, edit)


def add_layer(folder):
    def edit(weights):
        for side in "AB":
            name = f"base_model.model.{Q}.lora_{side}.weight"
            weights[name.replace("layers.0", "layers.7")] = weights[name].clone()

    change_weights(folder, edit)


def set_weight(name, make):
    def tamper(folder):
        def edit(weights):
            weights[name] = make(weights.get(name))

        change_weights(folder, edit)

    return tamper


def as_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut_short(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-40])


def flip(folder):
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def set_contract(**values):
    """Change a contract, of a time before seals."""

    def tamper(folder):
        path = folder / "colfolio.json"
        older = {"seal": {}, "weights_hash": ""}
        path.write_text(json.dumps(json.loads(path.read_text()) | older | values))

    return tamper


def drop_seal(folder):
    path = folder / "colfolio.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seal": {}}))


def set_option(**values):
    return lambda folder: change_config(folder, **values)


A, B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")
# How a folder is tampered with, whether its contract stays, and the words that tell of it.
TAMPERED = {
    "a renamed key": (rename_key, False, f"Missing: {Q}.lora_A.weight. Unexpected: {Q}x.lora_A"),
    "no B": (lambda f: change_weights(f, lambda w: w.pop(B)), False, f"Missing: {Q}.lora_B.weight"),
    "a layer too many": (add_layer, False, "Unexpected: language_model.layers.7.self_attn.q_proj"),
    "another rank": (
        set_weight(A, lambda w: w[:2].clone()),
        False,
        r"q_proj.lora_A.weight (2, 32) i",
    ),
    "a number for a rank": (set_option(r=5), False, "(3, 32) instead of (5, 32)"),
    "a foreign prefix": (
        set_weight("q_proj.lora_A.weight", lambda _: torch.ones(1)),
        False,
        "q_proj",
    ),
    "a head": (
        set_weight("base_model.model.lm_head.lora_A.weight", lambda _: torch.ones(1)),
        False,
        "no layer that a retriever has: base_model.model.lm_head.lora_A.weight",
    ),
    "integers": (set_weight(A, lambda w: w.to(torch.int8)), False, "torch.int8"),
    "no number": (set_weight(A, lambda w: w * torch.nan), False, f"NaN or infinite numbers in {A}"),
    "changed weights": (flip, True, "weights_hash"),
    "another base": (set_contract(base_hash="0" * 64), True, "base_hash 000000000000"),
    "other dimensions": (set_contract(dim=0), True, "dim"),
    "another position scheme": (set_contract(position_scheme="videorope"), True, "videorope"),
    "a pickle": (as_pickle, False, "adapter_model.bin is pickled"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), False, WEIGHTS),
    "a file cut short": (cut_short, False, "cut short"),
    "broken JSON": (lambda f: (f / CONFIG).write_text("{"), False, CONFIG),
    "another method": (set_option(peft_type="IA3"), False, "peft_type is 'IA3'"),
    "DoRA": (set_option(use_dora=True), False, "use_dora True"),
    "biases": (set_option(bias="lora_only"), False, "bias 'lora_only'"),
    "a changed base": (set_option(init_lora_weights="pissa"), False, "init_lora_weights 'pissa'"),
    "an unknown option": (set_option(use_newest=2), False, "use_newest 2"),
    "repeated layers": (set_option(layer_replication=[[0, 1]]), False, "layer_replication"),
    "a rank of zero": (set_option(r=0), False, "r: "),
    "a whole module": (set_option(modules_to_save=["visual"]), False, "modules_to_save has visual"),
    "no target": (set_option(target_modules=".*nothing"), False, "'.*nothing' fits no layer"),
    "no pattern": (set_option(target_modules="("), False, "target_modules cannot be used"),
    "a table": (
        set_option(target_modules=["embed_tokens"]),
        False,
        "not linear: language_model.emb",
    ),
    "an unused rank": (set_option(rank_pattern={"k_prj": 3}), False, "rank_pattern: k_prj fits no"),
    "another alpha": (set_option(lora_alpha=64), True, "says by plan_hash"),
    "another scale": (set_option(use_rslora=True), True, "says by plan_hash"),
    "another alpha of one layer": (
        set_option(alpha_pattern={"q_proj": 500.0}),
        True,
        "says by plan_hash",
    ),
    "no seal": (drop_seal, True, "weights_hash and no seal"),
    "no plan": (set_contract(plan_hash=""), True, "has no plan_hash"),
    "format true": (set_contract(format=True), True, "format: received True"),
    "a rank for no pattern": (set_option(rank_pattern={"[": 2}), False, "'[' is no pattern"),
    "a pattern too large": (
        set_option(alpha_pattern={"a{99999999999999}": 2}),
        False,
        "is no pattern",
    ),
    "a configuration too deep": (
        lambda f: (f / CONFIG).write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
        False,
        "nested deeper than 100 levels",
    ),
    "fewer targets": (set_option(target_modules=["q_proj"]), False, "Unexpected: custom_text_proj"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_adapter_is_refused_and_changes_nothing(name, saved, base):
    tamper, keeps_contract, words = TAMPERED[name]
    tamper(saved)
    if not keeps_contract:
        (saved / "colfolio.json").unlink()
    retriever = Retriever.from_pretrained(base)
    before = state_of(retriever)
    for act in (lambda: Retriever.from_pretrained(saved), lambda: load_adapter(retriever, saved)):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            act()
    assert_same_state(retriever, before)


def test_an_adapter_on_a_cast_base_is_refused_because_its_weights_are_others(saved, base):
    retriever = Retriever.from_pretrained(base)
    cast_parameters(retriever, torch.bfloat16)
    with pytest.raises(CheckpointError, match="in the dtype it has there"):
        load_adapter(retriever, saved)
