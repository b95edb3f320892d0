"""`xcit attend`: where a model looks, in images and videos."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from xcit.errors import BackendError, ConfigError, DataError, UnknownNameError

if TYPE_CHECKING:
    from xcit.inference.attention_names import Head
    from xcit.inference.attention_viewer import AttentionViewer
    from xcit.inference.whole_image import Size

USES = {
    "head": ("overlay", "mask"),
    "layer": ("overlay", "mask", "heads", "raw"),
    "keep": ("mask",),
    "opacity": ("overlay", "heads"),
    "side-by-side": ("overlay", "mask", "pca"),
    "foreground": ("pca",),
    "basis": ("pca",),
}
"""The kinds that an option is for: given without any of them it would do nothing."""


def attend(
    inputs: Annotated[list[str], Positional, arg(metavar="IMAGE|FOLDER|VIDEO...", help_behavior_hint="(required)")],
    *,
    model: Annotated[str, arg(metavar="MODEL")],
    out: Annotated[str, arg(metavar="DIR")],
    kind: Annotated[str, arg(metavar="KIND,KIND")] = "overlay",
    layer: Annotated[int | None, arg(metavar="1|2", help_behavior_hint="(default: the last)")] = None,
    head: Annotated[str | None, arg(metavar="mean|all|N", help_behavior_hint="(default: mean)")] = None,
    keep: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.6)")] = None,
    opacity: Annotated[float | None, arg(metavar="0..1", help_behavior_hint="(default: 0.75)")] = None,
    size: Annotated[
        str | None, arg(metavar="original|PX|HxW", help_behavior_hint="(default: the image's own, within limits)")
    ] = None,
    side_by_side: Annotated[bool, FlagCreatePairsOff] = False,
    foreground: Annotated[bool, FlagCreatePairsOff] = False,
    basis: Annotated[
        Literal["common", "each"] | None, arg(metavar="common|each", help_behavior_hint="(default: common)")
    ] = None,
    overwrite: Annotated[bool, FlagCreatePairsOff] = False,
    device: Annotated[str, arg(metavar="auto|cpu|cuda|mps")] = "auto",
) -> int:
    """Show where a model looks, in images and videos.

    Examples: `xcit attend dog.jpg --model xcit_small_12_p8 --out looks`, or
    `xcit attend clip.mp4 --model runs/finetune/model.safetensors --out looks --kind overlay,pca --side-by-side`.

    The whole image is looked at, nothing is cropped, at its own size rounded to whole patches: a small one is enlarged
    to what the model expects, one of more than 1,048,576 pixels scaled down to that. MODEL is a released model's name,
    a checkpoint that xcit wrote, or hf-hub:owner/name. Kinds, and the files that come of photo.jpg:

    overlay: the class token's attention laid over the image, photo_overlay.png.

    mask: the fewest patches that hold 60 % of it, white on black, photo_mask.png.

    heads: one figure of the image, the heads' mean and every head, photo_heads.png.

    raw: photo_attention.npy (heads, rows, columns), each head's shares of the patches, and photo_attention.json.

    xca: the channel attention of every block and head, photo_xca.png and photo_xca.npy.

    pca: the three main directions of the patch features as red, green and blue, photo_pca.png.

    Of a video come MP4 files instead of PNG, every frame at its time, upright, without sound; an odd height or width
    becomes even by a second last row or column; raw holds every frame, xca the first.

    What would not fit into memory is refused before it is begun, with the largest --size that would.

    A file that cannot be read costs one line on stderr, not the run. After Ctrl-C what was done is kept, of a video the
    frames up to there.

    Exit status: 0 if all was done, 1 if some files could not be read or not to their end, 2 if none could or for a
    mistake in the command, 130 after Ctrl-C.

    Args:
        inputs: Images, videos, folders of both (searched to any depth) and quoted patterns such as 'photos/**/*.jpg'.
        model: Who looks; see above.
        out: Folder for the results, not in one of the inputs. Inputs from several folders keep these below it.
        kind: What to make, several with commas between.
        layer: Which class-attention layer, from 1.
        head: What overlays and masks show: the heads' mean, every head (a file each), or one head, from 0.
        keep: The share of the attention that a mask holds.
        opacity: Of the overlay's brightest colour.
        size: At which size the model sees: original (whatever it is), the shorter side, or height and width.
        side_by_side: Put the image to the left of its overlay, mask or feature colours.
        foreground: Draw the feature colours of the foreground alone.
        basis: Feature colours mean the same in all images, or are each image's own. A video always has its own, so that
            this is for images only.
        overwrite: Replace results that are there already.
        device: Where to run (cuda:1 is the second card). auto takes the first there is of cuda, mps and cpu.
    """
    kinds = _kinds(kind)
    _refuse_idle(
        kinds,
        {
            "head": head is not None,
            "layer": layer is not None,
            "keep": keep is not None,
            "opacity": opacity is not None,
            "side-by-side": side_by_side,
            "foreground": foreground,
            "basis": basis is not None,
        },
    )
    if layer is not None and layer < 1:
        raise ConfigError(f"--layer is {layer}; the layers of class attention are counted from 1.")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(f"--keep is {keep}; it must be more than 0 and at most 1.")
    if opacity is not None and not 0 <= opacity <= 1:
        raise ConfigError(f"--opacity is {opacity}; it must be between 0 and 1.")
    wanted_head, wanted_size = _head(head), _size(size)
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out is {out}, which is a file; name a folder.")
    images, videos = _find(inputs)
    if basis is not None and not images:
        raise ConfigError("--basis is for images, and all inputs are videos, each of which has a basis of its own.")
    _refuse_among_inputs(folder, inputs)
    outputs = _Outputs(images, videos, folder, kinds, overwrite)
    outputs.check([wanted_head] if isinstance(wanted_head, int) else [0] if wanted_head == "all" else [None])

    import warnings

    from PIL import Image

    from xcit.inference.attention_viewer import AttentionViewer

    # Pillow warns from 89 million pixels on and refuses twice as many: the refusal is what we report.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    viewer = AttentionViewer(
        model,
        kinds=kinds,
        keep=0.6 if keep is None else keep,
        opacity=0.75 if opacity is None else opacity,
        beside=side_by_side,
        foreground=foreground,
        device=device,
    )
    _choose(viewer, layer, wanted_head, wanted_size)
    outputs.check(viewer.heads)
    return _Run(viewer, outputs, basis != "each").execute()


class _Outputs:
    """The inputs of one command, and what becomes of each."""

    def __init__(
        self, images: Sequence[Path], videos: Sequence[Path], out: Path, kinds: Sequence[str], overwrite: bool
    ) -> None:
        from xcit.inference.attention_names import output_stems

        self.images, self.videos, self.kinds, self.overwrite = images, videos, kinds, overwrite
        stems = output_stems([*images, *videos], out)
        self.stems = dict(zip([*images, *videos], stems, strict=True))

    def check(self, heads: Sequence[int | None]) -> None:
        """Refuse what would replace a file.

        Args:
            heads: of which overlays and masks will be; None stands for their mean.
        """
        from xcit.inference.attention_names import file_ends

        inputs = {path.resolve() for path in self.stems}
        videos = set(self.videos)
        for path, stem in self.stems.items():
            for end in file_ends(self.kinds, heads, ".mp4" if path in videos else ".png"):
                target = stem.with_name(stem.name + end)
                if not target.exists():
                    continue
                if target.resolve() in inputs:
                    raise ConfigError(f"{target} would be replaced, and is an input; name another --out.")
                if not self.overwrite:
                    raise ConfigError(f"{target} is there already; name another --out, or replace it with --overwrite.")


class _Run:
    """All inputs of one command, one after the other."""

    def __init__(self, viewer: AttentionViewer, outputs: _Outputs, common_basis: bool) -> None:
        self.viewer, self.common_basis = viewer, common_basis
        self.images, self.videos, self.stems = outputs.images, outputs.videos, outputs.stems
        self.num_done = self.num_failed = self.num_partial = 0

    def execute(self) -> int:
        """Look at everything and return the exit status."""
        total = len(self.images) + len(self.videos)
        try:
            self._look_at_all()
        except KeyboardInterrupt:
            _say(f"interrupted; {self.num_done} of {total} were done and are kept.")
            return 130
        if self.num_failed:
            _say(f"{self.num_failed} of {total} could not be looked at.")
        if self.num_failed == total:
            return 2
        return 1 if self.num_failed or self.num_partial else 0

    def _look_at_all(self) -> None:
        from xcit.inference.attention_files import fit_common_basis, write_image

        with _progress(len(self.images), "images") as advance:
            if "pca" in self.viewer.kinds and self.common_basis and len(self.images) > 1:
                fit_common_basis(self.viewer, self.images)
            for path in self.images:
                self._one(path, partial(write_image, self.viewer, path, self.stems[path]))
                advance(None)
        for path in self.videos:
            self._one(path, partial(self._video, path))

    def _one(self, path: Path, look: Callable[[], object]) -> None:
        try:
            look()
        except DataError as error:
            self.num_failed += 1
            text = str(error)
            _say(text if text.startswith(f"{path}:") else f"{path}: {text}")
        else:
            self.num_done += 1

    def _video(self, path: Path) -> None:
        from xcit.data.video import VideoReader
        from xcit.inference.attention_files import write_video

        with VideoReader(path) as video:
            num_frames = video.num_frames
        with _progress(num_frames, path.name) as advance:
            done = write_video(self.viewer, path, self.stems[path], advance)
        if done.has_sound:
            _say(f"{path}: its sound is not in the results.")
        if done.interrupted:
            of = f" of {num_frames}" if num_frames else ""
            _say(f"{path}: the results hold its first {done.num_frames}{of} frames.")
            raise KeyboardInterrupt
        if done.problem:
            self.num_partial += 1
            _say(done.problem)


def _find(inputs: list[str]) -> tuple[list[Path], list[Path]]:
    """Return the images and the videos that the inputs stand for.

    Raises:
        DataError: there are none of either where one was named.
        BackendError: there are videos, and PyAV is missing.
    """
    from xcit.data.images import EXTENSIONS, find_images
    from xcit.data.video_files import VIDEO_EXTENSIONS, find_videos, is_video

    found: dict[Path, None] = {}
    if not inputs:
        raise DataError("No inputs were given; name images, videos, folders or patterns such as 'photos/*.jpg'.")
    for name in inputs:
        folder = Path(name).expanduser()
        videos = find_videos(folder) if folder.is_dir() else []
        try:
            found |= dict.fromkeys(find_images([name]))
        except DataError as error:
            if not videos and "holds no image" in str(error):
                raise DataError(
                    f"The folder {name!r} holds neither image nor video (hidden files aside): none of its files ends "
                    f"in {', '.join(EXTENSIONS)}, nor in {', '.join(VIDEO_EXTENSIONS)}."
                ) from None
            if not videos:
                raise
        found |= dict.fromkeys(videos)
    films = [path for path in found if is_video(path)]
    if films and find_spec("av") is None:
        raise BackendError('Videos are read with PyAV, which is not installed: pip install "xcit[video]"')
    return [path for path in found if not is_video(path)], films


def _refuse_among_inputs(out: Path, inputs: list[str]) -> None:
    """Refuse a folder for results whose files the same command would take for inputs the next time."""
    import glob

    for name in inputs:
        source = Path(name).expanduser()
        matches = [source] if source.exists() else [Path(match) for match in glob.glob(str(source), recursive=True)]  # noqa: PTH207 (takes absolute ones)
        for folder in matches:
            if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(
                    f"--out is {out}, where the results would be inputs the next time, since all of {folder} is looked "
                    f"at; name a folder outside of it."
                )


def _choose(viewer: AttentionViewer, layer: int | None, head: Head, size: Size) -> None:
    """Set what depends on the model, or say in the words of the command line what the model lacks."""
    from dataclasses import replace

    if layer is not None and layer > viewer.num_layers:
        raise ConfigError(f"--layer is {layer}; the model's class-attention layers are 1 to {viewer.num_layers}.")
    if isinstance(head, int) and head >= viewer.num_heads:
        raise ConfigError(f"--head is {head}; the model's heads are 0 to {viewer.num_heads - 1}, or mean, or all.")
    if isinstance(size, (int, tuple)):
        sides = (size,) if isinstance(size, int) else size
        patch = viewer.whole.patch_size
        if min(sides) < patch:
            shown = "x".join(map(str, sides))
            raise ConfigError(f"--size is {shown}; it must be at least one patch of the model, which is {patch} px.")
    viewer.choose(-1 if layer is None else layer - 1, head)
    viewer.whole = replace(viewer.whole, size=size)


def _kinds(text: str) -> list[str]:
    from xcit.inference.attention_names import KINDS

    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError("kind", kind, KINDS, f"There are {', '.join(KINDS)}.")
    if not kinds:
        raise ConfigError(f"--kind is empty; there are {', '.join(KINDS)}.")
    return kinds


def _refuse_idle(kinds: list[str], given: dict[str, bool]) -> None:
    for name, is_given in given.items():
        if is_given and not set(kinds) & set(USES[name]):
            raise ConfigError(f"--{name} is for {' and '.join(USES[name])} only, and --kind is {','.join(kinds)}.")


def _head(text: str | None) -> Head:
    if text in (None, "mean", "all"):
        return text or "mean"
    if text.isdecimal():
        return int(text)
    raise ConfigError(f"--head is {text!r}; it must be mean, all or a head's number, from 0.")


def _size(text: str | None) -> Size:
    if text is None or text == "original":
        return text  # type: ignore[return-value]
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--size is {text!r}; it must be original, a number of pixels, or HEIGHTxWIDTH.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _say(text: str) -> None:
    print(f"xcit: {text}", file=sys.stderr)


@contextmanager
def _progress(total: int | None, name: str) -> Iterator[Callable[[int | None], None]]:
    """Show a progress bar on stderr if that is a terminal; yield what sets it to a number, or moves it on by one."""
    if not sys.stderr.isatty() or total == 0:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn(escape(name)),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(name, total=total)

        def move(done: int | None) -> None:
            if done is None:
                progress.advance(task)
            else:
                progress.update(task, completed=done)

        yield move
