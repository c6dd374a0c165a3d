"""What a run is validated on fits the machine, or is refused before the run begins."""

from colfolio.commands import splits


def test_a_validation_split_too_large_to_rank_is_refused_with_its_size(
    write_recipe, tmp_path, refused, monkeypatch
):
    monkeypatch.setattr(splits, "memory_here", lambda: 1000)
    told = " ".join(refused("train", write_recipe()).split())
    assert "split 'validation': validation ranks each of 12 queries among all 12" in told
    assert "validation.split=null" in told
    assert not (tmp_path / "run").exists()
