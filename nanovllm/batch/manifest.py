"""The manifest of a batch: what its results depend on, kept beside the output, so that a changed run is noticed."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from nanovllm.utils.checkpoint import fingerprint_file

_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What determines the results.

    input, model: digests of their contents, wherever they lie.
    options: those that can change a result.
    created: when the batch was begun, in seconds since 1970: the `created` of its responses.
    """

    input: str
    model: str
    options: Mapping[str, Any]
    created: int

    @classmethod
    def of(cls, input_digest: str, folder: Path, options: Mapping[str, Any]) -> "Manifest":
        """The manifest of a batch that begins now, on the checkpoint in `folder`."""
        return cls(input_digest, fingerprint_model(folder), json.loads(json.dumps(options, default=str)), int(time.time()))

    @classmethod
    def read(cls, output: Path) -> "Manifest | None":
        """The manifest of an output; None if it has none.

        Raises:
            ValueError: the file is no manifest.
        """
        path = manifest_path(output)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no manifest: {error}; --restart starts anew") from error

    def write(self, output: Path) -> None:
        """Put it beside an output, whole or not at all."""
        path = manifest_path(output)
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def differences(self, now: "Manifest") -> list[str]:
        """What has changed since, for people; empty if results of both belong together."""
        changed = [f"the {name} has changed" for name in ("input", "model") if getattr(self, name) != getattr(now, name)]
        for name in sorted({*self.options, *now.options}):
            before, after = self.options.get(name), now.options.get(name)
            if before != after:
                changed.append(f"{name} was {before!r:.80} and is {after!r:.80}")
        return changed


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies."""
    return output.with_name(f"{output.name}.manifest.json")


def fingerprint_model(folder: Path) -> str:
    """Tells checkpoints apart by the names, sizes, beginnings and ends of their files: all of the weights takes too long."""
    files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern)}
    digest = xxhash.xxh3_128()
    for file in sorted(files):
        digest.update(f"{file.name}:{fingerprint_file(file)};".encode())
    return digest.hexdigest()
