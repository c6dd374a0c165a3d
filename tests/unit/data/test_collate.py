import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from colfolio.batch import offsets_of
from colfolio.data.collate import Collator
from colfolio.data.patches import to_patches
from colfolio.data.prompts import IMAGE_TOKEN, Prompter, Templates
from colfolio.data.video import Clip
from colfolio.errors import CheckpointError, DocumentError
from colfolio.mrope import IMAGE, TEXT, position_ids


@pytest.fixture
def collator(shared_retriever):
    return shared_retriever.collator


def test_queries_are_packed_behind_one_another(collator, texts):
    packed = collator.queries(texts)
    ids = collator.prompter.query_ids(texts)
    assert packed.token_ids.tolist() == [token for row in ids for token in row]
    assert packed.lengths.tolist() == [len(row) for row in ids] == collator.query_lengths(texts)
    assert packed.patches.shape == (0, collator.budget.patch_dim)
    assert packed.grid_thw.shape == (0, 3)


def test_documents_carry_patches_grids_and_positions(collator, pages):
    packed = collator.documents(pages)
    patches, grids = to_patches([page[None] for page in pages], collator.budget)
    assert torch.equal(packed.patches, patches)
    assert torch.equal(packed.grid_thw, grids)
    visual = packed.token_ids == collator.prompter.image_token_id
    types = torch.where(visual, IMAGE, TEXT)
    assert torch.equal(packed.position_ids, position_ids(types, packed.offsets, grids))
    counts = [int(row.sum()) for row in visual.split(packed.lengths.tolist())]
    assert counts == [int(np.prod(collator.document_size(*page.shape[:2]))) for page in pages]


def test_an_example_is_packed_alike_alone_and_in_company(collator, pages):
    together = collator.documents(pages)
    tokens, places = together.token_ids, together.position_ids
    patch_ends = offsets_of(together.grid_thw.prod(dim=1))
    for row, page in enumerate(pages):
        alone = collator.documents([page])
        begin, end = together.offsets[row], together.offsets[row + 1]
        assert torch.equal(alone.token_ids, tokens[begin:end])
        assert torch.equal(alone.position_ids, places[:, begin:end])
        assert torch.equal(alone.patches, together.patches[patch_ends[row] : patch_ends[row + 1]])


def test_nothing_is_packed_to_no_rows(collator):
    assert len(collator.queries([])) == 0
    assert len(collator.documents([])) == 0


def test_an_image_that_cannot_be_cut_is_refused(collator):
    with pytest.raises(DocumentError, match="1 x 900 pixels"):
        collator.documents([np.zeros((1, 900, 3), np.uint8)])


def test_a_clip_has_its_own_placeholders_and_positions_that_move_in_time(collator, pages):
    clip = Clip(np.zeros((5, 56, 84, 3), dtype=np.uint8), 0.5)
    packed = collator.documents([pages[0], clip])
    assert packed.grid_thw[1].tolist() == [3, 4, 6]
    visual = (packed.token_ids == collator.prompter.video_token_id).nonzero()[:, 0]
    assert len(visual) == collator.num_visual_tokens(clip) == 3 * 2 * 3
    assert (visual >= packed.offsets[1]).all()
    time, height, width = packed.position_ids[:, visual] - packed.position_ids[:, visual[0], None]
    assert time.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert height.tolist() == [0, 0, 0, 1, 1, 1] * 3
    assert width.tolist() == [0, 1, 2] * 6


def test_a_tokenizer_without_a_token_for_clips_packs_pages_and_refuses_clips(collator, pages):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([IMAGE_TOKEN, "<|endoftext|>"])
    templates = Templates(document=IMAGE_TOKEN)
    bare = Collator(Prompter(tokenizer, templates), collator.budget)
    assert len(bare.documents(pages)) == len(pages)
    with pytest.raises(CheckpointError, match="video_pad"):
        bare.documents([Clip(np.zeros((2, 56, 56, 3), dtype=np.uint8), 0.5)])
