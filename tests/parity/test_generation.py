"""The loss of answers equals that of `transformers` over a padded batch, forward and backward."""

import numpy as np
import pytest
import torch
import transformers
from conversing import generator_of

from colfolio.batch import UNLABELLED
from colfolio.data.video import Clip
from colfolio.models.families import FAMILIES
from colfolio.models.generator import Generator
from colfolio.training.exact_batch import MemorySettings
from colfolio.training.generation import ExactText

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def library_class(family):
    name = FAMILIES[family].backbone.__name__.replace("Model", "ForConditionalGeneration")
    return getattr(transformers, name)


@pytest.fixture(params=[(name, tied) for name in NAMES for tied in (False, True)], ids=str)
def saved(request, tiny_shape_of, tmp_path):
    """A generator in float64, its folder, and the library's class of its family."""
    family, tied = request.param
    generator = generator_of(tiny_shape_of(family), tied=tied).to(torch.float64)
    generator.save_pretrained(tmp_path / "model")
    return generator, tmp_path / "model", library_class(family)


@pytest.fixture
def batch(saved, random_image):
    """Answers of several lengths about images of several sizes and a clip."""
    generator = saved[0]
    frames = np.stack([random_image(56, 84, seed) for seed in range(3)])
    visuals = [random_image(56, 28), random_image(84, 84), Clip(frames, 0.5), random_image(28, 56)]
    return generator.chat.conversations(
        visuals,
        ["where?", "what is it, and where does it go?", "down?", "is it left"],
        ["left", "right, then down and then left", "no", "down right"],
        range(4),
    )


def padded(batch, generator):
    """The rows of a batch as the library takes them: padded on the right, with our positions."""
    rows, inputs = len(batch), batch.inputs
    longest = int(inputs.lengths.max())
    ids, mask, types = torch.zeros(3, rows, longest, dtype=torch.int64)
    labels = torch.full((rows, longest), UNLABELLED)
    positions = torch.zeros(3, rows, longest, dtype=torch.int64)
    prompter = generator.collator.prompter
    for row in range(rows):
        place = slice(int(inputs.offsets[row]), int(inputs.offsets[row + 1]))
        length = place.stop - place.start
        ids[row, :length] = inputs.token_ids[place]
        mask[row, :length] = 1
        # the library's labels stand at their own tokens, ours one before
        labels[row, 1:length] = batch.labels[place][:-1]
        positions[:, row, :length] = inputs.position_ids[:, place]
    types[ids == prompter.image_token_id] = 1
    types[ids == prompter.video_token_id] = 2
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": types,
        "position_ids": positions,
        "labels": labels,
    } | visual_inputs(batch, generator)


def visual_inputs(batch, generator):
    inputs = batch.inputs
    patches = inputs.patches.double().split(inputs.grid_thw.prod(dim=1).tolist())
    is_clip = [
        bool(
            (
                inputs.rows(row, row + 1).token_ids == generator.collator.prompter.video_token_id
            ).any()
        )
        for row in range(len(batch))
    ]
    grids = inputs.grid_thw
    images = [row for row, clip in enumerate(is_clip) if not clip]
    clips = [row for row, clip in enumerate(is_clip) if clip]
    return {
        "pixel_values": torch.cat([patches[row] for row in images]),
        "image_grid_thw": grids[images],
        "pixel_values_videos": torch.cat([patches[row] for row in clips]),
        "video_grid_thw": grids[clips],
    }


def test_loss_and_gradient_are_those_of_the_library_over_a_padded_batch(saved, batch):
    generator, folder, library = saved
    theirs = library.from_pretrained(folder, dtype=torch.float64)
    expected = theirs(**padded(batch, generator)).loss
    expected.backward()
    summary = ExactText(generator, MemorySettings(chunk_tokens=40)).backward([batch], [0])
    assert summary.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    own = {
        name: weight.grad
        for name, weight in generator.named_parameters()
        if weight.grad is not None
    }
    named = {
        name.replace("model.", "backbone.", 1).replace("lm_head", "projection"): weight.grad
        for name, weight in theirs.named_parameters()
    }
    total = torch.stack([gradient.norm() for gradient in named.values() if gradient is not None])
    assert own.keys() == {name for name, gradient in named.items() if gradient is not None}
    for name, gradient in own.items():
        assert (gradient - named[name]).norm() <= 1e-6 * total.norm(), name


def test_what_the_library_saves_is_read_to_the_bit(saved, tmp_path):
    generator, folder, library = saved
    again = library.from_pretrained(folder, dtype=torch.float64)
    again.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    read = Generator.from_pretrained(tmp_path / "theirs", device="cpu")
    weights = read.weights()
    assert weights.keys() == generator.weights().keys()
    for name, tensor in generator.weights().items():
        assert torch.equal(weights[name], tensor), name
    assert read.contract.templates == generator.contract.templates


def test_greedy_answers_are_those_of_the_library(saved, random_image):
    generator, folder, library = saved
    image = random_image(56, 84)
    theirs = library.from_pretrained(folder, dtype=torch.float64).eval()
    prompt = generator.chat.prompts([image], ["where?"])
    types = (prompt.token_ids == generator.collator.prompter.image_token_id).long()
    made = theirs.generate(
        input_ids=prompt.token_ids[None],
        mm_token_type_ids=types[None],
        pixel_values=prompt.patches.double(),
        image_grid_thw=prompt.grid_thw,
        max_new_tokens=6,
        do_sample=False,
    )[0, len(prompt.token_ids) :]
    expected = generator.tokenizer.decode(made.tolist(), skip_special_tokens=True).strip()
    assert generator.generate(image, "where?", max_new_tokens=6) == expected
