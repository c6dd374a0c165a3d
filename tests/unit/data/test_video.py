"""Clips are written by the test itself: frame i is grey of brightness 8 i, left half darker."""

import struct

import av
import numpy as np
import pytest

from colfolio.data.video import load_clip
from colfolio.errors import DocumentError

HEIGHT, WIDTH, RATE = 84, 112, 10


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """Three seconds at ten frames a second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for brightness in range(0, 240, 8):
            pixels = np.full((HEIGHT, WIDTH, 3), brightness, dtype=np.uint8)
            pixels[:, WIDTH // 2 :] += 15
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(clip):
    return clip.frames[:, 10:-10, 10 : clip.frames.shape[2] // 3].mean(axis=(1, 2, 3))


def test_frames_are_those_shown_at_even_times(clip_file):
    clip = load_clip(clip_file, fps=2.0)
    assert clip.seconds_per_frame == 0.5
    assert clip.frames.shape == (6, HEIGHT, WIDTH, 3)
    assert np.allclose(brightness(clip), [8 * frame for frame in range(0, 30, 5)], atol=4)


def test_a_rate_above_the_file_s_own_shows_frames_again(clip_file):
    clip = load_clip(clip_file, fps=2.0 * RATE)
    twice = [8 * (frame // 2) for frame in range(60)]
    assert np.allclose(brightness(clip), twice, atol=4)


@pytest.mark.parametrize(("most", "kept", "seconds"), [(8, 8, 0.4), (30, 30, 0.1), (29, 15, 0.2)])
def test_too_many_frames_are_sampled_half_as_often(clip_file, most, kept, seconds):
    clip = load_clip(clip_file, fps=float(RATE), max_frames=most)
    assert len(clip.frames) == kept
    assert clip.seconds_per_frame == pytest.approx(seconds)
    step = round(seconds * RATE)
    assert np.allclose(brightness(clip), [8 * frame for frame in range(0, 30, step)], atol=4)


def test_large_frames_are_scaled_down_in_their_proportions(clip_file):
    clip = load_clip(clip_file, max_pixels=HEIGHT * WIDTH // 4)
    assert clip.frames.shape[1:3] == (HEIGHT // 2, WIDTH // 2)


def test_a_clip_that_a_telephone_marked_as_turned_is_turned(clip_file, tmp_path):
    written = bytearray(clip_file.read_bytes())
    matrix = written.index(b"tkhd") + 44  # of the track header (ISO 14496-12, section 8.3.2)
    one = 1 << 16
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, HEIGHT * one, 0, 1 << 30)
    written[matrix : matrix + 36] = clockwise
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(written)
    frame = load_clip(turned).frames[0].astype(int)
    assert frame.shape == (WIDTH, HEIGHT, 3)
    # turned clockwise, the dark left half lies above
    assert frame[: WIDTH // 3].mean() + 10 < frame[-WIDTH // 3 :].mean()


def test_what_is_no_clip_is_named(clip_file, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip_file.read_bytes()[:2000])
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for path, reason in (
        (tmp_path / "none.mp4", "does not exist"),
        (tmp_path, "is a folder"),
        (cut, "cannot be read|is not a video that can be read"),
        (text, "is not a video that can be read"),
    ):
        with pytest.raises(DocumentError, match=reason) as caught:
            load_clip(path)
        assert str(path) in str(caught.value)


def test_a_file_of_sound_alone_is_named(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DocumentError, match="holds no video"):
        load_clip(path)


@pytest.mark.parametrize(
    "wrong",
    [{"fps": 0.0}, {"fps": -1.0}, {"fps": float("inf")}, {"max_frames": 1}, {"max_pixels": 0}],
)
def test_a_rate_that_no_clip_can_have_is_refused(clip_file, wrong):
    with pytest.raises(ValueError, match="fps must be above 0, max_frames at least 2"):
        load_clip(clip_file, **wrong)
