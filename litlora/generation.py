"""From the ids of a prompt to an answer: prefill, decode, sample, stop, stream.

    prompt ids -> Conversation.ask -> Answer, which gives its text piece by piece as it is iterated
                  with --prompt_lookup a Lookup guesses tokens, several of which one forward pass checks
    many prompts -> generate_batch -> their Answers, the same tokens as one by one

A Conversation owns the keys and values of what was said and computes only what is new; the model holds no state, so
any number of conversations share one. Ids are counted against the context before anything is computed or allocated.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from litlora.cpu import one_thread
from litlora.errors import UserError, WorkError
from litlora.model import GPT, KVCache
from litlora.options import SamplingOptions
from litlora.prompts.channels import Channels, ChannelStream, stream_of
from litlora.replay import ReplayedStep
from litlora.tokenizer import Tokenizer

PREFILL_TOKENS = 512  # computed at once, over all rows: bounds the memory of a long prompt
FIRST_CACHE_TOKENS = 1024  # room for a row in a new cache
BATCH_ROWS = 8  # prompts answered side by side
LOOKUP_IDS = (3, 2)  # so many last ids must have stood together before: the longer run is looked for first
LOOKUP_PAUSE = 15  # most steps without a draft after drafts that were all wrong
NUCLEUS_GUESS = 256  # top_p's tokens are almost always among the likeliest 256: finding those takes 1/40 of sorting 152,000

FinishReason = Literal["stop", "length"]


class Conversation:
    """A model that is being talked to, and the tokens it holds in its cache.

    `ask` may be called again and again: the longest common beginning of the new prompt and what is held is not computed
    again. Answers are made one at a time; breaking off an answer, by leaving the loop or by an exception, is safe.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, stop_ids: Collection[int], channels: Channels | None = None) -> None:
        self.model, self.tokenizer, self.stop_ids, self.channels = model, tokenizer, frozenset(stop_ids), channels
        self.context = model.config.max_position_embeddings  # tokens
        self.cache = KVCache(min(self.context, FIRST_CACHE_TOKENS))
        self.replayed = ReplayedStep(model, self.cache) if ReplayedStep.serves(model) else None
        self.held: list[int] = []  # the ids whose keys and values are surely in the cache
        self.reused = 0  # tokens of the last prompt that were not computed again
        self.asked = 0

    def ask(self, prompt: Sequence[int], sampling: SamplingOptions, *, continues: bool = False) -> "Answer":
        """The Answer to a prompt's ids; nothing is computed until it is iterated.

        `continues`: the answer goes on in the middle of the prompt's text (no chat template), which decides its first space.
        Raises UserError where the prompt is empty or leaves no room in the context, before anything is allocated.
        """
        self.asked += 1
        answer = Answer(prompt, sampling, self.tokenizer, self.stop_ids, self.context, continues=continues, channels=self.channels)
        answer.tokens = self.tokens(answer, self.asked)
        return answer

    def tokens(self, answer: "Answer", asked: int) -> Iterator[int]:
        """The answer's ids without end; who reads them stops in time (Answer.push knows when).

        The sampler picks each of them from the model's own logits, also those that a draft foretold: it ends where it is wrong.
        """
        sampler = Sampler(answer.sampling, self.tokenizer.size, answer.prompt)
        lookup = self.lookup(answer)
        draft: Sequence[int] = ()
        if self.replayed:
            self.replayed.renew()
        logits, left = self.prefill(answer.prompt)[None], answer.limit  # (1 + D, V), D: length of the draft
        while True:
            for row, guess in itertools.zip_longest(logits, draft):
                token = sampler.pick(row)  # ()
                token_id, left = int(token), left - 1
                answer.looked_up += token_id == guess
                yield token_id
                assert asked == self.asked, "a newer question was asked in this conversation"
                if lookup is not None:
                    lookup.add(token_id)
                if token_id != guess:
                    break
                self.held.append(token_id)
            draft = () if lookup is None else lookup.draft(left - 1)  # the last token's logits are not wanted
            logits = self.step(token, token_id, draft)

    def lookup(self, answer: "Answer") -> "Lookup | None":
        """None also where each token's angles depend on how long the text is: several at once cannot have their own."""
        if not answer.sampling.prompt_lookup or self.model.config.rope.depends_on_length:
            return None
        return Lookup(answer.prompt, answer.sampling.prompt_lookup, self.stop_ids)

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> Tensor:  # (V,)
        """Logits after the prompt, of which only what is not held already is computed."""
        self.reused = common_beginning(self.held, prompt[:-1])  # the last token is always computed: its logits are wanted
        if self.model.config.rope.changes_between(len(self.held), len(prompt)):
            self.reused = 0
        self.cache.reach = len(prompt)
        del self.held[self.reused :]
        self.cache.rewind(self.reused)
        device = self.model.lm_head.weight.device
        for start in range(self.reused, len(prompt), PREFILL_TOKENS):
            part = list(prompt[start : start + PREFILL_TOKENS])
            reserve(self.cache, start + len(part), self.context)
            last = torch.tensor([len(part) - 1], device=device)
            logits = self.model(torch.tensor([part], device=device), cache=self.cache, logits_at=last)[0, 0]
            self.held += part
        return finite(logits)

    @torch.inference_mode()
    def step(self, token: Tensor, token_id: int, draft: Sequence[int] = ()) -> Tensor:  # () -> (1 + D, V)
        """Logits after one more token, and after each of a draft of what follows it. Of these `held` gets the first alone."""
        start = len(self.held)
        if self.model.config.rope.changes_between(start, start + 1):
            return self.prefill([*self.held, token_id])[None]
        self.cache.rewind(start)  # what the last draft had wrong
        reserve(self.cache, start + 1 + len(draft), self.context)
        tokens = torch.cat((token.view(1), token.new_tensor(draft)))[None]
        logits = self.replayed(tokens) if self.replayed and self.replayed.takes(tokens) else self.model(tokens, cache=self.cache)
        self.held.append(token_id)
        return cast(Tensor, logits[0])


def reserve(cache: KVCache, size: int, most: int) -> None:
    """Room for `size` tokens in each row of a cache. It doubles, up to `most`, so that memory follows use: a context may be 131,072.

    Layer by layer, so that no more than one is held twice; where memory ends in between, the cache still holds what it held.
    """
    if size <= cache.size:
        return
    grown = min(most, max(size, 2 * cache.size))
    for attention, held in cache.held.items():
        with torch.inference_mode(False):
            make = held[0].new_zeros if len(cache.lengths) > 1 else held[0].new_empty  # as KVCache: rows may look at each other's ends
            keys, values = (make(*old.shape[:2], grown, old.size(3)) for old in held)
        keys[:, :, : held[0].size(2)], values[:, :, : held[1].size(2)] = held
        cache.held[attention] = (keys, values)
    cache.size = grown


def generate_batch(
    model: GPT,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    *,
    rows: int = BATCH_ROWS,
    continues: bool = False,
    channels: Channels | None = None,
    done: Callable[[int], None] | None = None,
) -> list["Answer"]:
    """The finished answers to many prompts, in their order; `rows` of similar length are computed side by side.

    Each answer has the tokens it would have alone: greedy ones in fp32, sampled ones too, because every row draws from its
    own generator, seeded with `sampling.seed`. A prompt that does not fit refuses all of them (UserError) before any
    work. `done` hears how many answers are finished.
    """
    context = model.config.max_position_embeddings
    about: dict[str, Any] = {"continues": continues, "channels": channels}
    answers = [Answer(prompt, sampling, tokenizer, frozenset(stop_ids), context, **about) for prompt in prompts]
    if model.config.rope.depends_on_length:  # and so on each row's own: side by side they could not have one
        for count, answer in enumerate(answers, 1):
            for token_id in Conversation(model, tokenizer, stop_ids).tokens(answer, 0):
                answer.push(token_id)
                if answer.finish_reason:
                    break
            if done is not None:
                done(count)
        return answers
    by_length = sorted(answers, key=lambda answer: answer.prompt_tokens)
    for start in range(0, len(answers), rows):
        answer_side_by_side(model, tokenizer.size, by_length[start : start + rows])
        if done is not None:
            done(min(start + rows, len(answers)))
    return answers


@torch.inference_mode()
def answer_side_by_side(model: GPT, vocabulary: int, answers: "Sequence[Answer]") -> None:
    most = max(answer.prompt_tokens + answer.limit for answer in answers)
    longest = max(answer.prompt_tokens for answer in answers)
    cache = KVCache(min(most, max(longest, FIRST_CACHE_TOKENS)), rows=len(answers))
    samplers = [Sampler(answer.sampling, vocabulary, answer.prompt) for answer in answers]
    replayed = ReplayedStep(model, cache) if ReplayedStep.serves(model) else None
    logits = prefill_ragged(model, cache, [answer.prompt for answer in answers])  # (B, V)
    while True:
        picked = torch.stack([sampler.pick(row) for sampler, row in zip(samplers, logits, strict=True)])  # (B,)
        for answer, token_id in zip(answers, picked.tolist(), strict=True):
            if not answer.finish_reason:
                answer.push(token_id)
        if all(answer.finish_reason for answer in answers):
            return
        held = [length if answer.finish_reason else length + 1 for answer, length in zip(answers, cache.lengths, strict=True)]
        reserve(cache, max(cache.lengths) + 1, most)
        tokens = picked[:, None]
        logits = (replayed(tokens) if replayed and replayed.takes(tokens) else model(tokens, cache=cache))[:, 0]
        cache.rewind(held)  # rows that are finished stand still, so that they never outgrow the cache


def prefill_ragged(model: GPT, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:  # (B, V)
    """Each prompt's logits after its own last token. Rows are padded on the right, where nothing looks, and rewound."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)  # (B, T)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    padded = padded.to(device)
    found: Tensor | None = None
    width = max(1, PREFILL_TOKENS // len(prompts))
    for start in range(0, padded.size(1), width):
        part = padded[:, start : start + width]
        last = lengths - 1 - start  # (B,) where each row's last token lies, seen from this part
        here = (last >= 0) & (last < part.size(1))
        logits = model(part, cache=cache, logits_at=last.clamp(0, part.size(1) - 1).to(device))[:, 0]  # (B, V)
        found = logits if found is None else torch.where(here.to(device)[:, None], logits, found)
    cache.rewind(lengths.tolist())
    assert found is not None
    return finite(found)


def finite(logits: Tensor) -> Tensor:
    """The same logits, or a WorkError: a broken model must not look like a talkative one."""
    if not bool(logits.isfinite().all()):
        raise WorkError(
            "the model's logits are not finite numbers",
            hint="try --precision fp32; if that does not help the weights are broken: try an earlier step",
        )
    return logits


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids the two have in common, from the first on."""
    shorter = min(len(one), len(other))
    return next((n for n in range(shorter) if one[n] != other[n]), shorter)


# ---- one answer ------------------------------------------------------------------------------------------------------


class Answer:
    """One answer in the making: what was asked, what has come so far, why it ended."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        context: int,  # tokens
        *,
        continues: bool = False,
        channels: Channels | None = None,
    ) -> None:
        self.prompt, self.prompt_tokens, self.sampling, self.stop_ids = prompt, len(prompt), sampling, stop_ids
        self.limit = room(len(prompt), context)  # tokens this answer may have
        if sampling.max_new_tokens is not None:
            self.limit = min(self.limit, sampling.max_new_tokens)
        self.ids: list[int] = []  # every token that was picked, the stop token included
        self.looked_up = 0  # those among them that a draft foretold
        self.text = ""  # without the stop token, the stop text and what may turn out to be one
        self.finish_reason: FinishReason | None = None  # None: not finished, or broken off
        self.tokens: Iterable[int] = ()  # where the ids come from when the answer is iterated
        self.began = self.first = self.last = time.perf_counter()  # asked, first token, newest token
        self.held_back = ""  # text that may be the beginning of a stop text
        self.stream = stream_of(tokenizer, None if continues else channels)  # a text that is gone on with has none
        if continues:
            for token_id in prompt[-8:]:
                self.stream.push(token_id)

    def __iter__(self) -> Iterator[str]:
        """The text, in pieces that never break a character, as soon as it is certain."""
        self.began = time.perf_counter()
        for token_id in self.tokens:
            piece = self.push(token_id)
            if piece:
                yield piece
            if self.finish_reason:
                return

    def push(self, token_id: int) -> str:
        """Take one more token; the text that is certain now."""
        assert self.finish_reason is None
        self.last = time.perf_counter()
        if not self.ids:
            self.first = self.last
        self.ids.append(token_id)
        stopped, full = token_id in self.stop_ids, len(self.ids) == self.limit
        text = self.held_back + ("" if stopped else self.stream.push(token_id))
        if stopped or full:
            text += self.stream.flush()
        cut, certain = find_stop(text, self.sampling.stop)
        if cut is not None:
            text, self.held_back, self.finish_reason = text[:cut], "", "stop"
        elif stopped or full:
            self.held_back, self.finish_reason = "", "stop" if stopped else "length"
        else:
            text, self.held_back = text[:certain], text[certain:]
        self.text += text
        return text

    def all(self) -> str:
        """Make the whole answer; its text."""
        for _ in self:
            pass
        return self.text

    def message(self) -> dict[str, str]:
        """As a conversation goes on with it: what was thought in a channel of its own stands beside what was said."""
        if not isinstance(self.stream, ChannelStream):
            return {"role": "assistant", "content": self.text}
        content, thought, left = "", "", len(self.text)
        for kind, piece in self.stream.pieces:
            kept, left = piece[:left], max(0, left - len(piece))
            content += kept if kind in ("answer", "call") else ""
            thought += kept if kind == "thought" else ""
        return {"role": "assistant", "content": content, **({self.stream.channels.key: thought} if thought else {})}

    @property
    def first_token_seconds(self) -> float:
        return self.first - self.began

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first over the time since it; 0 where there is only one."""
        return (len(self.ids) - 1) / (self.last - self.first) if self.last > self.first else 0.0


def room(prompt_tokens: int, context: int) -> int:
    """How many tokens an answer may have after a prompt; UserError where there is no prompt or no room for one token."""
    if prompt_tokens == 0:
        raise UserError("the prompt has no tokens", hint="say something; this tokenizer puts no token in front of the text")
    if prompt_tokens >= context:
        what = f"the prompt has {prompt_tokens:,} tokens and the model's context {context:,}: there is no room for an answer"
        raise UserError(what, hint=f"shorten it to fewer than {context:,} tokens")
    return context - prompt_tokens


def find_stop(text: str, stops: Sequence[str]) -> tuple[int | None, int]:
    """Where the first stop text begins, or None; and how much of `text` cannot be the beginning of one."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    if found:
        return min(found), min(found)
    longest = max(map(len, stops), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return None, start
    return None, len(text)


# ---- drafts ----------------------------------------------------------------------------------------------------------


class Lookup:
    """How a text may go on: as it did after the same ids before (Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, 2304.04487).

    A draft that is wrong from its first token on has cost time for nothing. So the next steps go without one, more of them each
    time; a draft that is right ends that.
    """

    def __init__(self, ids: Sequence[int], most: int, stop_ids: Collection[int]) -> None:
        self.most, self.stop_ids = most, stop_ids  # tokens in a draft, and those after which nothing comes
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # the place that followed these ids the last time
        self.drafted: int | None = None  # how many ids there were when the last step's draft was made; None: it had none
        self.pause = self.wait = 0  # steps without a draft: in all, and still to come
        for token_id in ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        for n in LOOKUP_IDS:
            if len(self.ids) >= n:
                self.after[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token_id)

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where nothing says so."""
        if self.drafted is not None:
            right = len(self.ids) - self.drafted > 1  # beside the token that every step gives
            self.pause = self.wait = 0 if right else min(2 * self.pause + 1, LOOKUP_PAUSE)
            self.drafted = None
        if self.wait:
            self.wait -= 1
            return []
        most = max(0, min(most, self.most))
        at = next((self.after[last] for n in LOOKUP_IDS if (last := tuple(self.ids[-n:])) in self.after), len(self.ids))
        found = self.ids[at : at + most]
        again = itertools.islice(itertools.cycle(found), most)  # what ends with the text may be repeating itself
        draft = list(itertools.takewhile(lambda token_id: token_id not in self.stop_ids, again))
        if draft:
            self.drafted = len(self.ids)
        return draft


# ---- sampling --------------------------------------------------------------------------------------------------------


class Sampler:
    """Picks the tokens of one answer. Its random numbers come from a generator of its own on the CPU, one per token, so that a
    seed gives the same answer on every device and beside any neighbours."""

    def __init__(self, options: SamplingOptions, vocabulary: int, prompt: Sequence[int]) -> None:
        self.options, self.vocabulary = options, vocabulary  # ids from the tokenizer's size on are padding: never picked
        self.generator = torch.Generator().manual_seed(options.seed % 2**63)
        self.prompt = prompt
        self.seen: Tensor | None = None  # (vocabulary,) bool; only with a repetition penalty

    @torch.inference_mode()
    @one_thread()
    def pick(self, logits: Tensor) -> Tensor:  # (V,) -> ()
        logits = logits[: self.vocabulary]
        if self.options.repetition_penalty != 1.0:
            logits = self.penalized(logits)
        token = logits.argmax() if self.options.temperature == 0 else self.draw(logits)
        if self.seen is not None:
            self.seen.index_fill_(0, token.view(1), True)
        return token

    def penalized(self, logits: Tensor) -> Tensor:  # (vocabulary,)
        """CTRL (Keskar et al. 2019, arXiv:1909.05858), section 4.1, for tokens of the prompt and of the answer."""
        if self.seen is None:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            known = [token_id for token_id in set(self.prompt) if token_id < len(self.seen)]
            self.seen.index_fill_(0, torch.tensor(known, dtype=torch.int64, device=logits.device), True)
        penalty = self.options.repetition_penalty
        return torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def draw(self, logits: Tensor) -> Tensor:  # (vocabulary,) -> ()
        """By inverting the cumulative distribution at one uniform number: neither order nor device changes what is drawn."""
        options, device = self.options, logits.device
        logits = logits.float() if device.type != "mps" else logits.float().cpu()  # Apple's GPUs have no fp64
        probabilities = (logits / max(options.temperature, 1e-20)).softmax(0)  # fp32 has no room for less
        ids: Tensor | None = None  # None: probabilities[i] belongs to token i
        if options.top_k:
            values, ids = probabilities.topk(min(options.top_k, len(probabilities)))
            probabilities = values / values.sum()
        if options.top_p < 1:
            probabilities, order = nucleus(probabilities, options.top_p)
            ids = order if ids is None else ids[order]
        if options.min_p:
            probabilities = torch.where(probabilities >= options.min_p * probabilities.max(), probabilities, 0)
        heights = probabilities.double().cumsum(0)
        uniform = float(torch.rand((), dtype=torch.float64, generator=self.generator))  # [0, 1)
        place = torch.searchsorted(heights, uniform * heights[-1:], right=True)  # (1,): the first whose height is above it
        place = place.minimum(torch.searchsorted(heights, heights[-1:]))  # rounding must not lead past the last possible token
        return (place if ids is None else ids.gather(0, place))[0].to(device)


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:  # (n,) -> (m,), (m,)
    """The likeliest tokens that hold a share of `top_p` together (Holtzman et al. 2020, arXiv:1904.09751), at least one:
    their probabilities, likeliest first and zero for those outside, and their places."""
    if probabilities.device.type == "cpu" and len(probabilities) > NUCLEUS_GUESS:
        values, order = probabilities.topk(NUCLEUS_GUESS)
        if float(values.sum()) < top_p:
            values, order = probabilities.sort(descending=True)
    else:  # elsewhere looking at the sum would wait for the device
        values, order = probabilities.sort(descending=True)
    before = values.double().cumsum(0) - values.double()
    inside = before < top_p
    inside[0] = True
    return torch.where(inside, values, 0), order
