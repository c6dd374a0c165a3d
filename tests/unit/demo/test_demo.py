"""The whole demo on a handful of the bundled documents."""

import json
import shutil

import pytest

from colfolio.commands import demo
from colfolio.demo import plan

FAMILIES = ("asmeconf", "beuron", "biblatex-ext", "graphics", "maint-guide", "hyperref", "why3")
NUMBERS = [
    "ndcg@5",
    "recall@1",
    "chance_ndcg@5",
    "baseline_ndcg@5",
    "unseen_ndcg@5",
    "candidates",
    "page_ndcg@5",
    "train_seconds",
    "total_seconds",
    "seed",
]


@pytest.mark.slow
def test_the_demo_leaves_results_and_a_report_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    documents = tmp_path / "documents"
    for family in FAMILIES:
        shutil.copytree(plan.bundled("documents") / family, documents / family)
    bundled = plan.bundled
    places = {"documents": documents}
    monkeypatch.setattr(plan, "bundled", lambda name: places.get(name) or bundled(name))

    demo.demo_command(tmp_path / "out", seed=1, steps=4)

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name for name in NUMBERS if name not in results] == []
    assert results["seed"] == 1
    assert 0 < results["chance_ndcg@5"] < 1
    report = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert (tmp_path / "out" / "hits" / "hit-1.png").exists()

    monkeypatch.setattr(plan.subprocess, "call", lambda line: pytest.fail(f"ran again: {line}"))
    demo.demo_command(tmp_path / "out", seed=1, steps=4)
