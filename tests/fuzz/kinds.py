"""All kinds of cases, cheap ones first."""

from . import checkpoints, commands, config_fields, corpora, saved_files, tokenizer_files

KINDS = [config_fields, commands, tokenizer_files, corpora, saved_files, checkpoints]
