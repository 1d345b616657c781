"""Tokenizers: any kind of file behind one class, and the training of new ones."""

from tritium.core.tokenizer.tokenizer import END_THINK, IM_END, IM_START, THINK, StreamDecoder, Tokenizer
from tritium.core.tokenizer.training import DEFAULT_SIZE, SPECIAL, train_tokenizer
