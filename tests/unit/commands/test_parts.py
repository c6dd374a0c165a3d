import re
import shutil

import pytest

from colfolio.models import Retriever
from colfolio.models.adapters import LoraSettings, add_lora, save_adapter

_ROW = re.compile(r"(\w+) +([\d:]*) +([\d,]+) +([<\d.]+)% (?:(\S+) +(yes|no|partly))? +(.*)")


@pytest.fixture
def parts(colfolio):
    """Prints a model's parts; gives what was printed, and the rows of the table by part."""

    def run(*arguments):
        code, out, errors = colfolio("parts", *arguments)
        assert (code, errors) == (0, "")
        return out, [found.groups() for line in out.split("\n") if (found := _ROW.match(line))]

    return run


@pytest.fixture
def adapter_folder(base_folder, tmp_path):
    retriever = Retriever.from_pretrained(base_folder, device="cpu")
    add_lora(retriever, LoraSettings(rank=2, vision=("attn.qkv",)), seed=1)
    save_adapter(retriever, tmp_path / "adapter", str(base_folder))
    return tmp_path / "adapter"


def number(text):
    return float(text.replace(",", ""))


def test_the_parts_of_a_model_add_up(parts, base_folder, shared_retriever):
    out, rows = parts(base_folder)
    total = sum(weight.numel() for weight in shared_retriever.parameters())
    *each, whole = rows
    assert [row[:2] for row in each] == [
        *(("vision", "0:2"), ("merger", ""), ("embedding", ""), ("layers", "0:2")),
        *(("norm", ""), ("projection", "")),
    ]
    assert whole[:4] == ("all", "", f"{total:,}", "100.0")
    assert sum(number(row[2]) for row in each) == total
    assert {row[4:6] for row in each} == {("fp32", "yes")}
    assert f"\n{total:,} of {total:,} parameters train\n" in out
    mib = [[number(text) for text in row[6].split()] for row in rows]
    assert mib[-1] == pytest.approx([total * size / 2**20 for size in (4, 4, 8)], abs=0.06)
    for column in range(3):
        assert sum(row[column] for row in mib[:-1]) == pytest.approx(mib[-1][column], abs=0.5)


def test_of_an_adapter_its_tensors_alone_train(parts, adapter_folder):
    _, rows = parts(adapter_folder)
    trains = {row[0]: row[5] for row in rows[:-1]}
    assert trains.pop("adapters") == "yes"
    assert set(trains.values()) == {"no"}
    size = next(number(row[2]) for row in rows if row[0] == "adapters")
    assert [number(t) for t in rows[-1][6].split()][1] == pytest.approx(size * 4 / 2**20, abs=0.06)


def test_what_a_stage_opens_names_it(parts, base_folder, write_recipe):
    stages = [
        {"open": ["layers[1]", "norm"], "step": 2, "lr": 1e-3},
        {"open": ["embedding", "layers[0]"], "step": 4, "lr": 1e-4},
    ]
    settings = {"steps": 6, "batch": {"rows": 6}, "thaw": stages}
    frozen = ["vision", "embedding", "layers", "norm"]
    out, _ = parts(base_folder, write_recipe(train=settings | {"frozen": frozen}))
    found = re.findall(r"^(\w+) +([\d:]*) +[\d,]+ +[<\d.]+% fp32 +(\S+)", out, re.M)
    assert found == [
        *(("vision", "0:2", "no"), ("merger", "", "yes"), ("embedding", "", "thaw.1")),
        *(("layers", "0", "thaw.1"), ("layers", "1", "thaw.0"), ("norm", "", "thaw.0")),
        ("projection", "", "yes"),
    ]
    assert max(map(len, out.split("\n")[1:])) <= 80


def test_a_state_in_8_bits_is_smaller(parts, make_retriever, write_recipe, tmp_path):
    retriever = make_retriever(text={"vocab_size": 8192})
    retriever.save_pretrained(tmp_path / "large")
    wide, narrow = (
        parts(tmp_path / "large", write_recipe(), *overrides)[1][2]
        for overrides in ([], ["train.optimiser.state=torchao_8bit"])
    )
    assert wide[0] == narrow[0] == "embedding"
    weights, gradient, state = wide[6].split()
    assert (weights, gradient, state) == ("1.0", "1.0", "2.0")
    assert narrow[6].split() == ["1.0", "1.0", "0.5"]


def test_layers_that_are_alike_share_a_row(make_retriever):
    from colfolio.commands.parts import _rows
    from colfolio.models.parts import inventory

    retriever = make_retriever(text={"num_hidden_layers": 4})
    layers = retriever.backbone.language_model.layers
    layers[:2].requires_grad_(False)
    layers[2].mlp.requires_grad_(False)
    found = [row for row in _rows(retriever, inventory(retriever), {}) if row.part == "layers"]
    kinds = [("0:2", "no"), ("2", "partly"), ("3", "yes")]
    assert [(row.layers, row.trains) for row in found] == kinds


def test_without_weights_all_but_dtypes_is_told(parts, base_folder, tmp_path):
    whole, rows = parts(base_folder)
    shutil.copytree(base_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    out, found = parts(tmp_path / "base")
    assert [row[:4] + row[5:] for row in found] == [row[:4] + row[5:] for row in rows]
    assert {row[4] for row in found[:-1]} == {"?"}
    assert "dtypes are told by the files with weights" in out
    assert "dtypes are told" not in whole


def test_no_line_is_wider_than_a_terminal(parts, base_folder, adapter_folder):
    for path in (base_folder, adapter_folder):
        assert max(map(len, parts(path)[0].split("\n")[1:])) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "no such folder"),
        (["{base}", "none.yaml"], "none.yaml: cannot be read"),
        (["{base}", "{recipe}", "train.stebs=3"], "unknown key 'train.stebs'"),
    ],
)
def test_what_cannot_be_told_is_refused(refused, base_folder, write_recipe, arguments, message):
    places = {"base": base_folder, "recipe": write_recipe()}
    given = [argument.format(**places) for argument in arguments]
    assert re.search(message, refused("parts", *given))
