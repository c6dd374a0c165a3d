"""Shapes and types in signatures are executed in every test; threads are fixed.

Fixtures here are what several packages need: a tiny shape, its tokenizer, retrievers, images.
"""

from jaxtyping import install_import_hook

install_import_hook("colfolio", "beartype.beartype")

import copy  # noqa: E402
import io  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from colfolio.data.dataset import CorpusRow, Query, write_split  # noqa: E402
from colfolio.models import Shape, base_from_shape, train_tokenizer  # noqa: E402
from colfolio.models.families import FAMILIES  # noqa: E402

# tiny tensors gain nothing from a second thread, and on a busy machine wait for it
_THREADS = 1
torch.set_num_threads(_THREADS)
settings.register_profile("colfolio", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("colfolio")

_COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}
_FORMS = ("circle", "square", "triangle")
_TEXTS = ["a page of text", "Über die Größe", "chapter 12: results", "red circle, blue square"]


@pytest.fixture
def restore_threads():
    """For a test that trains with threads of its own."""
    yield
    torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session")
def tiny_shape():
    """Two layers of width 32: large enough to be wrong in every way, built in a blink."""
    return Shape.model_validate(
        {
            "dim": 16,
            "backbone": {
                "text_config": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 512,
                    "initializer_range": 0.2,
                    "bos_token_id": 0,
                    "eos_token_id": 0,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 100.0,
                        "mrope_section": [2, 1, 1],
                    },
                },
                "vision_config": {
                    "depth": 2,
                    "embed_dim": 16,
                    "hidden_size": 32,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "initializer_range": 0.2,
                },
            },
            "templates": {
                "num_query_suffix": 2,
                "document": "<|vision_start|><|image_pad|><|vision_end|>page",
            },
            "pixel_budget": {"min_pixels": 784, "max_pixels": 50176},
            "tokenizer": {"vocab_size": 300},
        }
    )


# What the tiny shape of another family has instead.
_OTHER_SHAPES = {
    "qwen2_vl": {},
    "qwen2_5_vl": {
        "vision_config": {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 56,  # 2 x 2 tokens
            "fullatt_block_indexes": [1],
            "tokens_per_second": 3,
            "initializer_range": 0.2,
        },
    },
    "qwen3_vl": {
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,  # 4 x 4
            "deepstack_visual_indexes": [1, 2],
            "initializer_range": 0.2,
        },
    },
    "colfolio_grafted": {
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
        "mrope_section": [2, 1, 1],
    },
}


@pytest.fixture(scope="session")
def tiny_shape_of(tiny_shape):
    """The tiny shape of a family: two or three layers a tower, all that is its own in use."""

    def shape_of(family):
        row = FAMILIES[family]
        budget = tiny_shape.pixel_budget.model_dump()
        if row.pixel_budget.patch == 16:
            limits = {"min_pixels": 1024, "max_pixels": 65536}
            budget = row.pixel_budget.model_dump() | limits
        templates = tiny_shape.templates.model_dump() | {"time_stamp": row.templates.time_stamp}
        values = tiny_shape.model_dump() | {
            "family": family,
            "backbone": tiny_shape.backbone | _OTHER_SHAPES[family],
            "pixel_budget": budget,
            "templates": templates,
        }
        return Shape.model_validate(values)

    return shape_of


@pytest.fixture
def make_family_retriever(tiny_shape_of, tiny_tokenizer):
    """Builds the tiny retriever of a family, by its `model_type`."""

    def make(family, seed=0, text=None, vision=None, **values):
        tiny = tiny_shape_of(family)
        backbone = copy.deepcopy(tiny.backbone)
        backbone["text_config"] |= text or {}
        backbone["vision_config"] |= vision or {}
        shape = tiny.model_copy(update={"backbone": backbone} | values)
        return base_from_shape(shape, tiny_tokenizer, seed)

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_shape):
    return train_tokenizer(_TEXTS, tiny_shape.tokenizer)


@pytest.fixture
def make_retriever(tiny_shape, tiny_tokenizer):
    """Builds the tiny retriever with other values of its shape where a test gives them."""

    def make(seed=0, text=None, vision=None, **values):
        backbone = copy.deepcopy(tiny_shape.backbone)
        backbone["text_config"] |= text or {}
        backbone["vision_config"] |= vision or {}
        shape = tiny_shape.model_copy(update={"backbone": backbone} | values)
        return base_from_shape(shape, tiny_tokenizer, seed)

    return make


@pytest.fixture
def retriever(make_retriever):
    """A tiny retriever that a test may change."""
    return make_retriever()


@pytest.fixture(scope="session")
def shared_retriever(tiny_shape, tiny_tokenizer):
    """A tiny retriever that no test changes."""
    return base_from_shape(tiny_shape, tiny_tokenizer, 0).eval()


@pytest.fixture(scope="session")
def random_image():
    """Draws noise of a size; the same for the same seed."""

    def draw(height, width, seed=0):
        generator = np.random.default_rng((seed, height, width))
        return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return draw


@pytest.fixture(scope="session")
def pages(random_image):
    """Images of several sizes: one token, short and long sides, over 128 patches, two equal."""
    sizes = [(28, 28), (56, 28), (28, 224), (196, 196), (56, 84), (56, 84), (30, 113)]
    return [random_image(*size, seed=seed) for seed, size in enumerate(sizes)]


@pytest.fixture(scope="session")
def texts():
    """Queries of several lengths, one of them over 128 tokens, two equal."""
    return ["red circle", "a", "chapter 12", "blue square left of a grey one " * 9, "a", "page"]


@pytest.fixture(scope="session")
def encode_png():
    return _png


@pytest.fixture(scope="session")
def write_shapes():
    """Writes splits of synthetic images 56 x 112 of three shapes, named in words by the queries.

    The combinations of a split occur in no other.
    """
    return _write_shapes


def _write_shapes(folder, sizes):
    singles = [f"{colour} {form}" for colour in _COLOURS for form in _FORMS]
    triples = [(a, b, c) for a in singles for b in singles for c in singles]
    order = np.random.default_rng(0).permutation(len(triples))
    begin = 0
    for split, size in sizes.items():
        picked = [triples[number] for number in order[begin : begin + size]]
        begin += size
        write_split(
            folder,
            split,
            [
                CorpusRow(f"{split}-{n}", _png(_draw(names)), f"d{n}")
                for n, names in enumerate(picked)
            ],
            [Query(f"{split}-{n}", ", ".join(names)) for n, names in enumerate(picked)],
            {f"{split}-{n}": {f"{split}-{n}": 1} for n in range(size)},
        )


def _draw(names):
    image = Image.new("RGB", (112, 56), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for number, name in enumerate(names):
        colour, form = name.split()
        left, top = 4 + 36 * number, 12
        box = (left, top, left + 30, top + 30)
        if form == "circle":
            pen.ellipse(box, fill=_COLOURS[colour])
        elif form == "square":
            pen.rectangle(box, fill=_COLOURS[colour])
        else:
            corners = [(left, top + 30), (left + 15, top), (left + 30, top + 30)]
            pen.polygon(corners, fill=_COLOURS[colour])
    return image


def _png(image):
    """An image, or its pixels, as PNG."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
