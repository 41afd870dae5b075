"""Open Assistant's exports as a TFDS data set, in array_record and without TensorFlow. Needs the extra `data`.

With the file, in any of the forms that `srlm_jax.data.oasst` reads, in a folder of its own:

    python -c "from srlm_jax.data import oasst_builder as b; b.build('oasst1', 'FOLDER', None)"

and then `--config.seed_data.trees=tfds:open_assistant/oasst1`. (The command `tfds build` needs TensorFlow.) One example
is one message: the split into seed sets stays with the run and its settings, and one data set serves every split.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from srlm_jax.data import oasst
from srlm_jax.errors import BadInput

_SPLITS = ("train", "validation")
_MARKS = ("deleted", "synthetic", "review_result")


class OpenAssistant(tfds.core.GeneratorBasedBuilder):
    """The messages that stand in a tree, withdrawn ones with their marks; `oasst.TFDS_NULLS` stand for unset values."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="oasst1"), tfds.core.BuilderConfig(name="oasst2"))
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put an Open Assistant export into the folder, trees or messages: JSON Lines, plain or gzip, or Parquet. Of "
        "two files one has 'validation' in its name."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        features = dict.fromkeys(("message_id", "parent_id", "text", "role", "lang"), tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            description="Messages of Open Assistant: conversation trees with ranked replies.",
            features=tfds.features.FeaturesDict(features | {"rank": np.int32} | dict.fromkeys(_MARKS, np.bool_)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        folder = epath.Path(dl_manager.manual_dir)
        files = {}
        for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir()):
            split = _SPLITS["validation" in path.name]
            if split in files:
                raise BadInput(f"{folder}: both {files[split].name} and {path.name} would be the split '{split}'")
            files[split] = path
        if not files:
            raise BadInput(f"{folder}: holds no file. {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return {split: self._generate_examples(path) for split, path in files.items()}

    def _generate_examples(self, path: epath.Path) -> Iterator[tuple[int, dict]]:
        for number, message in enumerate(oasst.messages(oasst.read_export(path).trees)):
            nulls = {name: null for name, null in oasst.TFDS_NULLS.items() if message[name] is None}
            yield number, message | nulls


def build(release: str, manual_dir: epath.PathLike, data_dir: epath.PathLike | None) -> OpenAssistant:
    """Prepares "oasst1" or "oasst2" from the files in `manual_dir`, in TFDS's own folder where `data_dir` is None; what
    has been prepared before stays. `as_data_source(split)` of the result reads it.

    Raises:
      ValueError: another release, or files that are not one export; BadRecord, with its place, where one is damaged.
    """
    builder = OpenAssistant(config=release, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return builder
