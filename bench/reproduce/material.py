"""What is learnt from: episodes, what students know before, the teacher and its signal."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from bench.reproduce.explorer import explorer
from bench.reproduce.reading import read
from bench.reproduce.study import (
    BASE_RATE,
    BASE_STEPS,
    GAMES,
    GAMES_SEED,
    HELD_OUT,
    MAX_LENGTH,
    ROOMS,
    SIZES,
    TEACHER,
    TEACHER_STEPS,
    WANDERED,
    Folder,
    Size,
)
from bench.reproduce.wanderer import wanderer
from sadkern.data import prepare
from sadkern.evaluate.environments.alfworld import ALFWorld
from sadkern.evaluate.environments.alfworld_games import game
from sadkern.evaluate.episode import Episode, Log
from sadkern.evaluate.episode import read as read_logs
from sadkern.evaluate.play import play
from sadkern.files import write_whole
from sadkern.teacher import OnlineTeacher
from sadkern.teacher.build import build
from sadkern.teacher.cached import store_for
from sadkern.train.segmentation import resegmented

END = "<|endoftext|>"
WANDERINGS, WANDERED_TURNS = 6, 6  # of a game, of each
PARTS = 2  # of the games, each played by a process


def episodes(folder: Folder, part: int) -> None:
    """Plays every so many-th game, by both agents; those that are there already stay."""
    with ExitStack() as stack:
        logs = {
            kind: stack.enter_context(Log(folder.episodes(kind, part)))
            for kind in ("explored", "wandered")
        }
        for index in range(part, GAMES + HELD_OUT, PARTS):
            env = ALFWorld(game(GAMES_SEED, index, **ROOMS))
            agents = [("explored", 0, explorer(index), 50)]
            for n in range(WANDERINGS if index < WANDERED else 0):
                agents.append(("wandered", n, wanderer(env, (index, n)), WANDERED_TURNS))
            for kind, n, agent, turns in agents:
                if (env.name, env.task, n) not in logs[kind]:
                    logs[kind].append(play(env, agent, max_turns=turns, sample=n))
            env.close()


def played(folder: Folder, kind: str) -> list[Episode]:
    """In the order of their games."""
    found = read_logs(folder.episodes(kind, part) for part in range(PARTS))
    return sorted(found, key=lambda one: (int(one.task.rsplit("-", 1)[1]), one.sample))


def taught(folder: Folder) -> tuple[list[str], list[str]]:
    """Texts of the explorer's successes: to be taught on, and held out."""
    texts = [(int(one.task.rsplit("-", 1)[1]), one.text) for one in played(folder, "explored")
             if one.success]  # fmt: skip
    return [text for i, text in texts if i < GAMES], [text for i, text in texts if i >= GAMES]


def train_tokenizer(folder: Folder) -> None:
    """Byte-level BPE, of the episodes that are learnt from."""
    texts = taught(folder)[0] + [one.text for one in played(folder, "wandered")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=1024, special_tokens=[END], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END, model_max_length=2048
    ).save_pretrained(folder.tokenizer)


def tokenizer_of(folder: Folder) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder.tokenizer)


def examples_of(folder: Folder, texts: list[str]) -> list[dict[str, Any]]:
    records = [{"text": text} for text in texts]
    return prepare(records, tokenizer_of(folder), max_length=MAX_LENGTH)


def new_model(tokenizer: Any, size: Size) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=size.width,
            intermediate_size=8 * size.width // 3, num_hidden_layers=size.layers,
            num_attention_heads=size.width // 32,
            num_key_value_heads=size.width // 32, head_dim=32, max_position_embeddings=2048,
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    return without_mask(model)


def without_mask(model: Any) -> Any:
    """In training, where rows are padded on their right and no token sees what follows it: a step
    then takes a fifth less."""

    def without(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, "attention_mask": None}) if module.training else None

    model.model.register_forward_pre_hook(without, with_kwargs=True)
    return model


def train_base(folder: Folder, size: str) -> None:
    """What a student knows before it is taught."""
    wandering(folder, SIZES[size], size).save_pretrained(folder.base(size))


def train_teacher(folder: Folder) -> None:
    model, kept = wandering(folder, TEACHER, "teacher"), folder.half_done("taught")
    read(model, examples_of(folder, taught(folder)[0]), TEACHER_STEPS, BASE_RATE / 2, kept)
    model.save_pretrained(folder.teacher)


def wandering(folder: Folder, size: Size, name: str) -> Qwen3ForCausalLM:
    set_seed(0)
    model = new_model(tokenizer_of(folder), size)
    texts = [one.text for one in played(folder, "wandered")]
    read(model, examples_of(folder, texts), BASE_STEPS, BASE_RATE, folder.half_done(name))
    return model


def load(path: Path) -> Any:
    return without_mask(Qwen3ForCausalLM.from_pretrained(path))


def write_signal(folder: Folder) -> None:
    """The teacher's, of every token of every episode: its hidden states."""
    teacher = OnlineTeacher(load(folder.teacher).eval())
    store = store_for(folder.signal, teacher, tokenizer_of(folder), mode="hidden")
    ours, held_out = taught(folder)
    data = [resegmented(one, "all", 0) for one in examples_of(folder, ours + held_out)]
    build(store, data, teacher)


def write_test_games(folder: Folder, games: list[dict[str, Any]]) -> None:
    """What is played is part of the run: whole or not at all."""
    folder.root.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in games]
    write_whole(folder.test_games, "".join(lines).encode())
