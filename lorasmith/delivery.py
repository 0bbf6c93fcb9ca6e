"""Between the Hub and a run: what is fetched before and meanwhile, what is sent, what stays on the disk.

A run asks ``fetch`` before it begins a file of the result, says ``finished`` after it, and knows no more of this.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lorasmith.card import model_card
from lorasmith.errors import BadOption
from lorasmith.execution import sources as sources_of
from lorasmith.execution.workplace import Workplace
from lorasmith.hub.writing import check_writable, require_valid
from lorasmith.jsonfile import open_regular
from lorasmith.pushing import CARD, Upload, read_card, require_pushed, target, untouched
from lorasmith.records import Output, Plan, Progress, Pushed, Survival, Write
from lorasmith.sidefiles import PROVENANCE
from lorasmith.sources import Sources, side_paths
from lorasmith.streaming import Stream, most_room

FetchCallback = Callable[[Output, Callable[[], bool]], None]


class Delivery:
    """How the inputs of one run come and where its result goes: to ``out``, to a repository, or to both.

    ``place`` is where the result grows, ``name`` what to call it.
    """

    def __init__(
        self,
        sources: Sources,
        out: str | None,
        push: str | None,
        *,
        stream: bool = False,
        card: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if out is None and push is None:
            raise BadOption("say where the result goes: -o/--out OUT, --push REPO, or both")
        if push is None:
            require_pushed(**options, card=card)
        self._sources = sources
        self._out = out
        self._target = None if push is None else target(push, **options)
        self._streams = stream
        self._card = None if card is None else read_card(card)
        self._upload: Upload | None = None
        self._stream: Stream | None = None
        self._copies: dict[str, str] = {}
        self.name = out if out is not None else f"hf://{self._target.repo if self._target else ''}"
        self.place = out if out is not None else _nowhere(self._target.repo if self._target else "")

    # --------------------------------------------------------------------------------------------------- before

    def check(self, plan: Plan) -> None:
        """Raise what ``prepared`` would, as far as it can be known without making anything."""
        self._check_stream(plan)
        if self._target is not None:
            check_writable(self._sources.hub, self._target)

    def _check_stream(self, plan: Plan) -> None:
        if self._streams and plan.base_origin is None:
            raise BadOption("--stream is for a base on the Hub; this one is on the disk already")
        if self._streams and not all(file.endswith(".safetensors") for file, _, _ in plan.base_files):
            raise BadOption("--stream needs safetensors; pickled weights are downloaded whole to be read")

    def room(self, plan: Plan) -> int:
        """The most bytes that this takes where the result grows."""
        passing = most_room(plan, stays=self._out is not None) if self._streams else 0
        beside = sum(file.size for file in plan.side_files)
        if self._out is not None:
            return plan.bytes_written + passing
        return beside + (passing or sum(output.size for output in plan.outputs))

    def download(self, plan: Plan) -> int:
        """Bytes of the base that are to come from the Hub."""
        if plan.base_origin is None:
            return 0
        alone = self._out is None and self._target is not None
        copies = set(untouched(plan).values()) if alone else set()
        files = {file: size for file, size, _ in plan.base_files if file not in copies}
        files |= {file.source: file.size for file in plan.side_files if file.source is not None}
        return sum(size for file, size in files.items() if not os.path.exists(file))

    @contextlib.contextmanager
    def prepared(self, plan: Plan, progress: Callable[[Progress], None] | None = None) -> Iterator[None]:
        """Make sure of the right to push, and fetch what must be here before the run; ends what goes on after it."""
        self._check_stream(plan)
        self._plan = plan
        if self._target is not None:
            require_valid(self._sources.hub, self._target, self._card or self._text(None))
            self._upload = Upload(self._sources.hub, self._target, plan.hash)
            if plan.base_origin is not None:
                self._copies = untouched(plan)
        self._work = self._without_copies(plan)
        needed = [] if self._streams else [file for output in self._work.outputs for file in sources_of(output)]
        self._sources.fetch([*side_paths(plan), *needed], progress)
        try:
            yield
        finally:
            if self._upload is not None:
                self._upload.close()

    def _without_copies(self, plan: Plan) -> Plan:
        """The plan without files that only go to a repository to which the Hub itself copies them."""
        if self._out is not None or not self._copies:
            return plan
        return replace(plan, outputs=tuple(one for one in plan.outputs if one.name not in self._copies))

    # ------------------------------------------------------------------------------------------------ meanwhile

    def begin(self, place: Workplace) -> Plan:
        """Go on from what earlier runs have finished and sent; returns what is to be executed."""
        self._place = place
        if self._streams:
            self._stream = Stream(self._work, self._sources, os.path.join(place.scratch, "base"))
            self._work = self._stream.plan
        gone = set()
        if self._upload is not None:
            self._upload.begin(place.scratch)
            gone = self._upload.sent if self._out is None else set()
            for name, file in self._copies.items():
                self._upload.copy(name, *self._sources.whence(file))
        place.begin(self._work, gone)
        for output in self._work.outputs:
            if place.is_finished(output):
                self.finished(output)
        return self._work

    @property
    def fetch(self) -> FetchCallback | None:
        """What a run is to ask before it begins a file; None where all is here."""
        return None if self._stream is None else self._fetch

    def _fetch(self, output: Output, stopped: Callable[[], bool]) -> None:
        assert self._stream is not None
        upload = self._upload
        self._stream.fetch(output, lambda: stopped() or (upload is not None and upload.has_failed))
        if upload is not None:
            upload.require_well()

    def finished(self, output: Output) -> None:
        """Take note that a file of the result is on the disk: send it, and let go of what it was made from."""
        if self._stream is not None:
            self._stream.merged(output)
        if self._upload is None or output.name in self._copies:
            self._leave(output)
            return
        self._upload.require_well()
        self._upload.add(output.name, self._place.where(output.name), lambda: self._leave(output))

    def _leave(self, output: Output) -> None:
        """A file of the result is where it is to be: nothing more is done with it."""
        if self._out is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._place.where(output.name))
        if self._stream is not None:
            self._stream.leave(output)

    # ---------------------------------------------------------------------------------------------------- after

    def commit(self, survival: Survival | None) -> Pushed | None:
        """Make the result visible in the repository, if it goes to one."""
        if self._upload is None:
            return None
        files: dict[str, str | bytes] = {one.name: self._place.where(one.name) for one in self._plan.side_files}
        if self._plan.single_file:
            files = {}
        files[CARD] = (self._card or self._text(survival)).encode()
        names = [str(use.origin.repo if use.origin else "a local adapter") for use in self._plan.adapters]
        return self._upload.finish(files, f"Merge {', '.join(dict.fromkeys(names))}", self._instead)

    def settle(self, place: Workplace) -> None:
        """Let the result appear where it is to stay; leave nothing where it is not."""
        if self._out is not None:
            place.publish()
            return
        place.remove()
        with contextlib.suppress(OSError):  # others may be at work there
            os.rmdir(os.path.dirname(self.place))

    @contextlib.contextmanager
    def _instead(self, name: str) -> Iterator[str]:
        """A file of the base that the Hub cannot copy, for the time that it takes to send it."""
        if self._out is not None:
            yield self._place.where(name)
            return
        file = self._copies[name]
        if os.path.exists(file):
            yield file
            return
        path = self._sources.fetch_into(file, os.path.join(self._place.scratch, "base"), lambda: False)
        yield path
        os.unlink(path)

    def _text(self, survival: Survival | None) -> str:
        assert self._target is not None
        title = self._target.repo.rsplit("/", 1)[1]
        library = "transformers" if any(one.name == "config.json" for one in self._plan.side_files) else None
        record = provenance(self._plan)
        return model_card(
            record,
            title,
            survival=survival,
            base_card=self._base_card(),
            library=library,
            single_file=self._plan.single_file,
        )

    def _base_card(self) -> str | None:
        """The text of the base's own card."""
        file = self._sources.beside_base(CARD, self._plan.base)
        if file is None:
            return None
        with open_regular(file) as stream:
            text: str = stream.read().decode("utf-8", "replace")
        return text


def provenance(plan: Plan) -> dict[str, Any]:
    """The record that the result of a plan carries."""
    for file in plan.side_files:
        if file.name == PROVENANCE:
            return dict(json.loads(file.text or "{}"))
    header = plan.outputs[0].steps[0]
    assert isinstance(header, Write)
    return dict(json.loads(json.loads(header.data[8:])["__metadata__"][PROVENANCE.removesuffix(".json")]))


def _nowhere(repo: str) -> str:
    """Where a result grows that only goes to a repository: in a folder of the client's, one for each repository."""
    from huggingface_hub import constants

    return os.path.join(constants.HF_HOME, "lorasmith", repo.replace("/", "--"))
