"""Trains a sentencepiece text tokenizer on captions: launch/train_text_tokenizer.py --shards DIR --out DIR"""

import sys
from pathlib import Path

from base.config import counted
from base.terminal import say
from data.samples.captions import read_captions
from launch.runs import entry


def main() -> None:
    """Reads all captions of the first samples of every data set, and writes the tokenizer."""
    parser = entry.parser(__doc__ or "")
    parser.add_argument("--shards", nargs="+", required=True, help="data sets with captions or instructions")
    parser.add_argument("--samples", type=int, default=100_000, help="of each data set")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--out", type=Path, required=True, help="folder of the text tokenizer")
    arguments = parser.parse_args()
    from data.samples.text import check_folder, train_text_tokenizer
    from data.shards import ShardDataset

    check_folder(arguments.out)
    captions: list[str] = []
    for directory in arguments.shards:
        dataset = ShardDataset.open(directory)
        for sample in dataset.read(range(min(arguments.samples, len(dataset)))):
            captions += read_captions(sample)
    trained = train_text_tokenizer(captions, arguments.out, arguments.vocab_size)
    few = f" (the captions give no more than that of {arguments.vocab_size:,})"
    fewer = few if trained.vocab_size < arguments.vocab_size else ""
    say(
        f"{arguments.out}: {counted(trained.vocab_size, 'token')} from {counted(len(captions), 'caption')}{fewer}"
    )


if __name__ == "__main__":
    sys.exit(entry.run(main))
