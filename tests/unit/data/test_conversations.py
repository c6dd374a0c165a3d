import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversing import DIRECTIONS, generator_of, png, write_lines, write_moving

from colfolio.data.conversation_batches import ConversationSource, collated, in_order
from colfolio.data.conversations import load_conversations
from colfolio.data.dataset import load_dataset
from colfolio.data.formats.conversation_files import splits_in
from colfolio.data.sampler import SamplerPosition
from colfolio.data.video import Clip
from colfolio.distributed import World
from colfolio.errors import DatasetError

ROW = {"question": "where?", "answer": "left"}


@pytest.fixture
def folder(tmp_path, random_image):
    """Two images and a video to name."""
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(png(random_image(28, 56, seed)))
    with av.open(tmp_path / "clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 64, 32
        for number in range(8):
            pixels = np.full((32, 64, 3), 30 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return tmp_path


@pytest.fixture(scope="module")
def chat(tiny_shape_of):
    return generator_of(tiny_shape_of("qwen2_vl")).chat


def visual(dataset, row):
    return dataset.visual(row, 2.0, 50176)


def test_lines_name_images_videos_and_frames(folder, random_image):
    seen = [{"image": "0.png"}, {"video": "clip.mp4"}, {"frames": ["0.png", "1.png"]}]
    timed = {"frames": ["1.png"], "seconds_per_frame": 0.25}
    write_lines(folder, "train", [ROW | each for each in [*seen, timed]])
    dataset = load_conversations(folder, "train")
    assert len(dataset) == 4
    assert dataset.answers == ["left"] * 4
    assert np.array_equal(visual(dataset, 0), random_image(28, 56))
    video = visual(dataset, 1)
    assert (video.frames.shape, video.seconds_per_frame) == ((4, 32, 64, 3), 0.5)
    clip = visual(dataset, 2)
    assert clip.seconds_per_frame == 0.5  # at the model's frame rate
    assert np.array_equal(clip.frames[1], random_image(28, 56, 1))
    assert visual(dataset, 3).seconds_per_frame == 0.25


@pytest.mark.parametrize("form", ["struct", "bytes", "path"])
@pytest.mark.parametrize(
    "name", ["train.parquet", "data/train-00000-of-00001.parquet", "train/a.parquet"]
)
def test_parquet_holds_images_or_names_them(folder, random_image, form, name):
    pixels = random_image(28, 56)
    value = {"struct": {"bytes": png(pixels), "path": None}, "bytes": png(pixels), "path": "0.png"}
    table = pa.table(
        {"question": ["a"], "answer": ["b"], "image": [value[form]], "frames": [[value[form]] * 2]}
    )
    mixed = pa.concat_tables(
        [
            table.set_column(3, "frames", pa.nulls(1, table.schema.field("frames").type)),
            table.set_column(2, "image", pa.nulls(1, table.schema.field("image").type)),
        ]
    )
    (folder / name).parent.mkdir(exist_ok=True)
    pq.write_table(mixed, folder / name)
    dataset = load_conversations(folder, "train")
    assert np.array_equal(visual(dataset, 0), pixels)
    assert np.array_equal(visual(dataset, 1).frames, np.stack([pixels, pixels]))


def test_the_fingerprint_is_of_the_content_alone(folder, random_image):
    write_lines(folder, "train", [ROW | {"image": "0.png"}])
    table = {"question": ["where?"], "answer": ["left"], "image": [png(random_image(28, 56))]}
    pq.write_table(pa.table(table), folder / "test.parquet")
    first = load_conversations(folder, "train").fingerprint
    assert first == load_conversations(folder, "test").fingerprint
    found = {first}
    for change in ({"answer": "right"}, {"image": "1.png"}, {"question": "why?"}):
        write_lines(folder, "train", [ROW | {"image": "0.png"} | change])
        found.add(load_conversations(folder, "train").fingerprint)
    write_lines(folder, "train", [ROW | {"frames": ["0.png"]}])
    found.add(load_conversations(folder, "train").fingerprint)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "0.png", "answer": None},
            "answer is missing; 1 rows do not, the first is row 2",
        ),
        ({"image": "0.png", "answer": "  "}, "the answer is empty"),
        ({}, "a row has one of image, video, frames"),
        ({"image": "0.png", "video": "clip.mp4"}, "a row has one of image, video, frames"),
        ({"image": "none.png"}, "no file 'none.png'"),
        ({"image": "../0.png"}, "lies outside"),
        ({"frames": []}, "at least one frame"),
        ({"frames": ["0.png"], "seconds_per_frame": 0.0}, "above 0"),
        ({"image": 3}, "several kinds"),
    ],
)
def test_rows_that_are_not_whole_are_refused(folder, row, message):
    write_lines(folder, "train", [ROW | {"image": "1.png"}, ROW | row])
    with pytest.raises(DatasetError, match=message):
        load_conversations(folder, "train")


def test_what_is_no_split_of_conversations_is_refused(folder):
    with pytest.raises(DatasetError, match=r"no split 'train'.*splits found: none"):
        load_conversations(folder, "train")
    with pytest.raises(DatasetError, match="no folder"):
        load_conversations(folder / "0.png", "train")
    write_lines(folder, "train", [ROW | {"image": "0.png"}])
    with pytest.raises(DatasetError, match=r"no split 'validation'.*splits found: train; set"):
        load_conversations(folder, "validation")
    (folder / "train.jsonl").write_text('{"question": \n')
    with pytest.raises(DatasetError, match=r"train\.jsonl, line 1: is not valid JSON"):
        load_conversations(folder, "train")
    (folder / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="in JSONL and in Parquet"):
        load_conversations(folder, "train")


def test_an_image_that_cannot_be_read_is_named_with_its_row(folder):
    (folder / "2.png").write_bytes(b"no picture")
    write_lines(folder, "train", [ROW | {"image": "0.png"}, ROW | {"frames": ["0.png", "2.png"]}])
    with pytest.raises(DatasetError, match=r"row 2: .*2\.png: is not an image"):
        visual(load_conversations(folder, "train"), 1)


def test_frames_of_several_sizes_are_no_clip(folder, random_image):
    (folder / "2.png").write_bytes(png(random_image(56, 56)))
    write_lines(folder, "train", [ROW | {"frames": ["0.png", "2.png"]}])
    with pytest.raises(DatasetError, match="of one size"):
        visual(load_conversations(folder, "train"), 0)


def test_splits_are_found_and_other_files_are_none(folder):
    write_moving(folder, "train", 2)
    write_moving(folder / "data", "validation", 2)
    write_lines(folder, "test", [ROW | {"image": "0.png"}])
    (folder / "notes.jsonl").write_text(json.dumps({"a": 1}))
    assert splits_in(folder) == ["train", "validation", "test"]


def test_each_objective_refuses_the_dataset_of_the_other(folder, write_shapes, tmp_path):
    write_lines(folder, "train", [ROW | {"image": "0.png"}])
    with pytest.raises(DatasetError, match=r"holds conversations.*set train\.objective"):
        load_dataset(folder, "train")
    write_shapes(tmp_path / "shapes", {"train": 4})
    with pytest.raises(DatasetError, match=r"dataset for retrieval.*set train\.objective"):
        load_conversations(tmp_path / "shapes", "train")


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    write_moving(folder, "train", 10)
    return load_conversations(folder, "train")


def test_ranks_share_the_batch_of_one(moving, chat):
    def rows(world, count=5):
        source = ConversationSource(moving, chat, 2.0, 5, 3, world)
        drawn = source.batches(SamplerPosition())
        return [next(drawn) for _ in range(count)]

    whole = rows(World())
    for size in (2, 3):
        shares = [rows(World(rank, size, rank, size)) for rank in range(size)]
        for number, plain in enumerate(whole):
            ids = [row for share in shares for row in share[number].batch.row_ids.tolist()]
            assert sorted(ids) == sorted(plain.batch.row_ids.tolist())
            assert {share[number].after for share in shares} == {plain.after}


def test_a_source_goes_on_from_a_position(moving, chat):
    source = ConversationSource(moving, chat, 2.0, 4, 3)
    drawn = source.batches(SamplerPosition())
    first = [next(drawn) for _ in range(5)]
    later = ConversationSource(moving, chat, 2.0, 4, 3).batches(first[2].after)
    for expected in first[3:]:
        again = next(later)
        assert again.batch.row_ids.tolist() == expected.batch.row_ids.tolist()
        assert again.batch.labels.tolist() == expected.batch.labels.tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_a_split_in_order_holds_each_row_once(moving, chat, size):
    shares = [
        list(in_order(moving, chat, 2.0, 4, World(rank, size, rank, size))) for rank in range(size)
    ]
    assert {len(share) for share in shares} == {3}
    ids = [row for share in shares for batch in share for row in batch.row_ids.tolist()]
    assert sorted(ids) == list(range(10))


def test_rows_of_like_length_stand_beside_one_another(moving, chat):
    batch = collated(moving, list(range(10)), chat, 2.0)
    lengths = [len(moving.answers[row]) for row in batch.row_ids.tolist()]
    assert lengths == sorted(lengths)
    assert set(moving.answers) == set(DIRECTIONS)
    assert isinstance(moving.visual(0, 2.0, 50176), Clip)


@pytest.mark.parametrize(("rows", "size"), [(11, 1), (2, 3)])
def test_batches_that_no_rank_could_have_are_refused(moving, chat, rows, size):
    with pytest.raises(DatasetError, match=rf"batch\.rows is {rows}.*ranks, {size}.*, 10"):
        ConversationSource(moving, chat, 2.0, rows, 0, World(0, size, 0, size))
