"""Whether two videos are equal, and what is written: every file is read back."""

import types

import pytest
import torch

from dit_patch.errors import DitPatchError
from dit_patch.pipelines import pictures

pytest.importorskip("PIL", reason="needs pillow")


def ramp(count=3, size=16):
    """Frames from black to white."""
    return torch.linspace(0, 1, count)[:, None, None, None].expand(count, 3, size, size)


def test_videos_are_compared_bit_by_bit():
    video = torch.rand(4, 3, 8, 8)
    other = video.clone()
    other[2, 1, 0, 0] += 0.25

    assert pictures.difference(video, video.clone()) is None
    assert pictures.difference(video, other) == pictures.Difference(frame=2, largest=pytest.approx(0.25))


def test_zero_and_minus_zero_differ():
    assert pictures.difference(torch.zeros(1, 3, 2, 2), -torch.zeros(1, 3, 2, 2)) == pictures.Difference(
        frame=0, largest=0.0
    )


def test_the_contact_sheet_has_a_row_for_each_video_from_the_first_frame_to_the_last():
    dark = torch.linspace(0.1, 0.2, 9)[:, None, None, None].expand(9, 3, 32, 48)

    sheet = pictures.contact_sheet({"plain": dark, "patched": dark + 0.5}, columns=3)

    assert sheet.size == (64 + 3 * (48 + 4), 20 + 2 * (32 + 4))
    middle = [[sheet.getpixel((64 + 24 + column * 52, 20 + 16 + row * 36))[0] for column in range(3)] for row in (0, 1)]
    assert middle == [[26, 38, 51], [153, 166, 178]]


@pytest.mark.parametrize("shape, expected", [((2, 5, 3, 8, 8), [5, 5]), ((3, 3, 8, 8), [1, 1, 1])])
def test_what_a_pipeline_returns_are_videos_and_pictures_are_of_one_frame(shape, expected):
    made = torch.rand(shape, dtype=torch.bfloat16)
    videos = pictures.videos(types.SimpleNamespace(**{"frames" if len(shape) == 5 else "images": made}))
    assert [len(video) for video in videos] == expected
    assert torch.equal(torch.stack(videos).view(shape), made.float())


def test_what_is_not_a_tensor_of_frames_is_refused():
    with pytest.raises(DitPatchError, match="got list"):
        pictures.videos(types.SimpleNamespace(images=["a picture"]))


def test_a_gif_has_all_frames_and_their_pace(tmp_path):
    from PIL import Image

    pictures.find_writer(tmp_path / "a.gif")(tmp_path / "a.gif", ramp(4), 10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (4, (16, 16), 100)
        shades = []
        for frame in range(4):
            gif.seek(frame)
            shades.append(gif.convert("RGB").getpixel((8, 8))[0])
    assert shades == pytest.approx([0, 85, 170, 255], abs=2)


def test_an_mp4_has_all_frames_and_their_pace(tmp_path):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    pictures.find_writer(tmp_path / "a.mp4")(tmp_path / "a.mp4", ramp(4, size=38), 10)
    with imageio.get_reader(tmp_path / "a.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 10
        frames = list(reader.iter_data())
    assert [frame.shape for frame in frames] == [(38, 38, 3)] * 4  # not rounded to whole macro blocks
    assert [int(frame[19, 19, 0]) for frame in frames] == pytest.approx([0, 85, 170, 255], abs=6)


def test_a_png_is_the_picture_or_a_sheet_of_the_video(tmp_path):
    from PIL import Image

    pictures.find_writer(tmp_path / "a.png")(tmp_path / "a.png", ramp(1), 10)
    pictures.find_writer(tmp_path / "b.PNG")(tmp_path / "b.PNG", ramp(9), 10)
    with Image.open(tmp_path / "a.png") as picture, Image.open(tmp_path / "b.PNG") as sheet:
        assert picture.size == (16, 16)
        assert sheet.size == (64 + 5 * (16 + 4), 20 + 16 + 4)


def test_a_name_without_ending_is_a_folder_with_every_frame_to_the_last_bit(tmp_path):
    from PIL import Image

    video = torch.rand(3, 3, 8, 8)
    pictures.find_writer(tmp_path / "frames")(tmp_path / "frames", video, 10)
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png"]
    for name, frame in zip(names, pictures.to_bytes(video)):
        with Image.open(tmp_path / "frames" / name) as picture:
            assert picture.tobytes() == frame.tobytes()


def test_a_grey_video_is_written_in_colours():
    assert pictures.to_bytes(torch.rand(2, 1, 4, 4)).shape == (2, 4, 4, 3)


def test_an_ending_that_nobody_can_write_is_quoted(tmp_path):
    with pytest.raises(DitPatchError, match=r"--out: `.*x.webm`: expected .* not `.webm`"):
        pictures.find_writer(tmp_path / "x.webm")


def test_a_label_stands_above_each_frame_and_leaves_the_frame_as_it_is():
    video = ramp(3, 32)
    made = pictures.labelled("plain", video)
    assert made.shape == (3, 3, 48, 32) and torch.equal(made[:, :, 16:], video)
    bar = made[0, :, :16]
    assert bar.max() == 1 and bar.min() < 0.1 and torch.equal(made[2, :, :16], bar)


def test_a_video_that_the_encoder_has_cut_short_is_no_success(tmp_path, monkeypatch):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    monkeypatch.setattr(ffmpeg, "count_frames_and_secs", lambda path: (2, 1.0))
    with pytest.raises(OSError, match="only 2 of 3 frames are in it"):
        pictures.write_mp4(tmp_path / "x.mp4", ramp(3, 32))
