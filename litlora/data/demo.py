"""The world of the embedded demo: what its base was trained on, and the rows that `litlora finetune lora` learns.

Everything is invented here, from a seed. The base reads documents about people, places and things, and learns to write
and to repeat them; it never sees an order written as JSON. The demo rows teach exactly that:

    Please send 37 lanterns to Marlin Torsen in Velwick.
    {"name": "Marlin Torsen", "city": "Velwick", "item": "lanterns", "quantity": 37}

People and places belong to one of three parts by their spelling: those of the base's text, of the training rows and of
the held-out rows. Things and quantities are split between training and held-out rows alike. So no value of a held-out
row occurs in a training row, and a right answer cannot have been learnt by heart.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

SEED = 1234

Row = dict[str, Any]
T = TypeVar("T")
Part = Literal["pretrain", "train", "heldout"]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ---- words -----------------------------------------------------------------------------------------------------------

HEADS = words(
    "Al An Ar Bel Ber Bran Bri Cal Car Cor Dar Del Dor Ed El Em Fal Far Fen Gar Gil Gre Hal Har Hel Il Is Jan Jor Kar Kel Kes "
    "Lan Lor Lu Mal Mar Mil Mor Nel Nor Ol Or Per Pol Ral Ren Ros Sal San Sel Tal Tor Tri Ul Val Vel Ver Wal Wen Wil Yar Zan Zel"
)
MIDDLES = words("a ba da do e go i ka la le li ma mi na ne o ra ri sa si ta ti va vi")
NAME_TAILS = words("bert bin da dan den dra gan la len lia lin lo man mon na nan nia nor ra ric rin ron sa son ta tan tin vin vik wen")
FAMILY_TAILS = words(
    "berg by dal der fel gard gren ham ker land ley lund man mark more ner nick quist rick sen ser stad ston ter vall well"
)
CITY_TAILS = words(
    "beck borg bury cester dale den field ford gate ham haven holm hurst ling low mere mond mouth pool port stead ton vik ville wick"
)
THINGS = words(
    "anchors apples axes bags balls barrels baskets beads bells belts blankets boats books boots bottles bowls boxes bricks brooms "
    "brushes buckets buttons cakes candles cards carpets chairs chests clocks coats combs cookers crates cups curtains cushions desks "
    "dishes dolls doors drums eggs engines feathers fences filters flags flutes forks frames funnels gates glasses gloves hammers hats "
    "helmets hinges hooks horns jackets jars keys kettles kites knives ladders lamps lanterns lemons lenses letters levers lids locks "
    "magnets maps masks mats melons mirrors motors mugs nails needles nets onions ovens paddles pans papers pears pencils pens pillows "
    "pipes plates plums pots pumps puzzles rakes ribbons rings robes ropes rugs sacks saddles sails saws scarves screws seeds shelves "
    "shirts shoes shovels skirts sledges socks spoons springs stamps stones stools stoves straps tables tents tiles torches towels toys "
    "trays trunks tubes vases violins wagons watches wheels whistles windows wires"
)
COLOURS = words("black blue brown green grey orange pink purple red silver white yellow")
WORKS = words(
    "baker builder cook doctor driver farmer gardener guard miller painter pilot sailor singer smith tailor teacher weaver writer"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
# Words that nobody knows are made of these, so that copying does not depend on knowing the word.
ONSETS = [
    "",
    *words("b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sc sh sk sl sp st str th tr tw wh"),
]
VOWELS = words("a a a e e e i i i o o o u u ai au ay ea ee ei ie io oa oo ou ow y")
CODAS = ["", "", "", *words("b ch ck d f g gs k l ll lt m mp n nd ng nk ns nt p r rd rk rn rs rt s sh ss st t th ts v x z")]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Dice:
    """Chance from a seed. Only random() is used: it alone is promised to be the same in every version of Python."""

    def __init__(self, seed: str, part: Part) -> None:
        self.random, self.part = random.Random(seed).random, part

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], n: int) -> list[T]:
        """`n` different items in any order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(n)]

    def word(self, *pieces: Sequence[str]) -> str:
        """A word of these pieces that belongs to this part of the world."""
        while True:
            word = "".join(self.pick(piece) for piece in pieces)
            if part_of(word) == self.part:
                return word

    def first(self) -> str:
        return self.word(HEADS, NAME_TAILS) if self.below(2) else self.word(HEADS, MIDDLES, NAME_TAILS)

    def family(self) -> str:
        return self.word(HEADS, FAMILY_TAILS) if self.below(2) else self.word(HEADS, MIDDLES, FAMILY_TAILS)

    def name(self) -> str:
        return f"{self.first()} {self.family()}"

    def city(self) -> str:
        return self.word(HEADS, CITY_TAILS) if self.below(2) else self.word(HEADS, MIDDLES, CITY_TAILS)

    def item(self) -> str:
        """`lanterns` or `red lanterns`."""
        thing = self.pick([thing for thing in THINGS if self.part in ("pretrain", part_of(thing, 5))])
        return thing if self.below(2) else f"{self.pick(COLOURS)} {thing}"

    def quantity(self) -> int:
        while True:
            number = 2 + self.below((8, 98, 998)[self.below(3)])
            if self.part in ("pretrain", part_of(str(number), 5)):
                return number

    def nonsense(self) -> str:
        if self.below(4) == 0:
            word = "".join(self.pick(LETTERS) for _ in range(2 + self.below(4)))
        else:
            word = "".join(self.pick(ONSETS) + self.pick(VOWELS) + self.pick(CODAS) for _ in range(1 + self.below(2)))
        return word.capitalize() if self.below(2) else word


def part_of(word: str, of: int = 10) -> Part:
    """Which part of the world a word belongs to, by its spelling alone; `of=5` leaves the base's part out."""
    share = zlib.crc32(word.encode()) % of
    return "heldout" if share == 0 else "train" if share <= 4 else "pretrain"


# ---- the demo's rows: an order, and the same as JSON -----------------------------------------------------------------

ORDERS = (
    "Please send {quantity} {item} to {name} in {city}.",
    "{name} from {city} orders {quantity} {item}.",
    "{name} would like {quantity} {item}, delivered to {city}.",
    "Ship {quantity} {item} to {city}, for {name}.",
    "Order from {city}: {quantity} {item} for {name}.",
    "My name is {name} and I need {quantity} {item} in {city}.",
    "Can you bring {quantity} {item} to {city}? {name} will pay.",
    "We are out of {item}. {name} in {city} wants {quantity}.",
    "In {city}, {name} is waiting for {quantity} {item}.",
    "{quantity} {item} for {name}, {city}.",
)


def order(dice: Dice) -> Row:
    values = {"name": dice.name(), "city": dice.city(), "item": dice.item(), "quantity": dice.quantity()}
    return {"instruction": dice.pick(ORDERS).format(**values), "output": json.dumps(values)}


# ---- the base's text -------------------------------------------------------------------------------------------------

# How a fact is told, what may be asked about it, and what is answered.
FACTS = (
    ("{name} lives in {city}.", "Where does {name} live?", "{city}"),
    ("The {work} of {city} is called {name}.", "What is the {work} called?", "{name}"),
    ("{name} has {quantity} {item}.", "How many {item} does {name} have?", "{quantity}"),
    ("There are {quantity} {item} in {city}.", "What is in {city}?", "{item}"),
    ("On {day}, {name} came to {city}.", "Who came to {city}?", "{name}"),
    ("{name} makes {item}.", "What does {name} make?", "{item}"),
    ("The house of {name} is {colour}.", "Which colour is the house?", "{colour}"),
    ("{quantity} {item} were lost near {city}.", "How many {item} were lost?", "{quantity}"),
    ("{name}, a {work}, was born on a {day}.", "What is the work of {name}?", "{work}"),
    ("At {city} we saw {name} with {quantity} {item}.", "How many {item} did {name} carry?", "{quantity}"),
    ("{item} from {city} are {colour}, says {name}.", "Who says so?", "{name}"),
    ("Room {quantity} of the inn at {city} is {colour}.", "Which room is it?", "{quantity}"),
    ("A {work} in {city} painted {quantity} {item}.", "Which city was it?", "{city}"),
)
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You are litlora, a toy model.", "Answer with what you were told.")
KEYS = ("name", "city", "item", "quantity", "colour", "work", "day")


def values(dice: Dice) -> dict[str, Any]:
    """One thing of each kind, for the documents below; now and then a word that nobody knows."""
    strange = [dice.below(4) == 0 for _ in range(3)]
    return {
        "name": strangers(dice).title() if strange[0] else dice.name() if dice.below(4) else dice.first(),
        "city": strangers(dice).title() if strange[1] else dice.city(),
        "item": strangers(dice) if strange[2] else dice.item(),
        "quantity": dice.quantity(),
        "colour": dice.pick(COLOURS),
        "work": dice.pick(WORKS),
        "day": dice.pick(DAYS),
    }


def strangers(dice: Dice) -> str:
    return " ".join(dice.nonsense() for _ in range(1 + dice.below(2)))


def upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def tell(dice: Dice, known: dict[str, Any], n: int) -> str:
    return " ".join(upper(fact.format(**known)) for fact, _, _ in dice.some(FACTS, n))


def lines(pairs: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in pairs)


def text(*parts: str) -> Row:
    return {"text": "\n".join(parts)}


def chat(dice: Dice, *turns: str) -> Row:
    """User and assistant in turn; now and then a system prompt before them."""
    system = [{"role": "system", "content": dice.pick(SYSTEM)}] if dice.below(8) == 0 else []
    return {"messages": system + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def story(dice: Dice) -> Row:
    """The same few things told again and again: most of it can be copied from above."""
    known = values(dice)
    return text(tell(dice, known, 3), tell(dice, known, 3))


def record(dice: Dice) -> Row:
    known = values(dice)
    pairs = [(key, known[key]) for key in dice.some(KEYS, 4)]
    both = [lines(pairs), tell(dice, known, 3)]
    return text(*(both if dice.below(2) else reversed(both)))


def braces(dice: Dice) -> Row:
    """JSON and what it says; never the other way round."""
    known = values(dice)
    keys = dice.some(KEYS, 3)
    pairs = [(key, known[key]) for key in keys]
    return text(json.dumps(dict(pairs)), dice.pick((lines(pairs), tell(dice, known, 2), json.dumps(dict(pairs[::-1])))))


def quotes(dice: Dice) -> Row:
    words = [str(dice.pick((dice.name, dice.city, dice.quantity, dice.nonsense))()) for _ in range(3)]
    quoted = [f'"{word}"' for word in words]
    return text(", ".join(words), ", ".join(quoted), dice.pick((f"[{', '.join(quoted)}]", f"({'; '.join(words)})", "\n".join(words))))


def question(dice: Dice) -> Row:
    known = values(dice)
    told = dice.some(FACTS, 2)
    facts = " ".join(upper(fact.format(**known)) for fact, _, _ in told)
    turns = [(ask.format(**known), answer.format(**known)) for _, ask, answer in told]
    (ask, answer), (ask2, answer2) = turns if dice.below(2) else turns[::-1]
    return chat(dice, f"{facts} {ask}", answer, ask2, answer2)


def form(dice: Dice) -> Row:
    known = values(dice)
    fact = dice.pick(FACTS)[0]
    keys = [key for key in KEYS if "{" + key + "}" in fact]
    return chat(dice, upper(fact.format(**known)) + " Make a list.", lines([(key, known[key]) for key in keys]))


def repeat(dice: Dice) -> Row:
    word = dice.pick((dice.name, dice.city, dice.quantity, dice.nonsense))()
    other = dice.pick((dice.item, dice.city, dice.quantity, dice.nonsense))()
    ask, answer = dice.pick(
        (
            ("Repeat: {0} {1}", "{0} {1}"),
            ("Say {0} and {1}.", "{0} and {1}"),
            ("Put {0} in quotes.", '"{0}"'),
            ("Put {0} and {1} in quotes.", '"{0}" and "{1}"'),
            ("Quote {1}, then {0}.", '"{1}", "{0}"'),
        )
    )
    return chat(dice, ask.format(word, other), answer.format(word, other))


SMALL_TALK = (
    (("Hello", "Hi", "Hello!", "Hi there"), "Hello! I am a toy model. Tell me something about someone, and ask me about it."),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am the demo of litlora: a very small model that shows that everything works.",
    ),
    (("What can you do?", "Help", "How can you help me?"), "Tell me that someone lives somewhere, and ask me where. I can do little else."),
    (("Thanks", "Thank you", "Thank you!"), "You are welcome."),
    (("Bye", "Goodbye", "See you"), "Goodbye!"),
)


def small_talk(dice: Dice) -> Row:
    asks, answer = dice.pick(SMALL_TALK)
    return chat(dice, dice.pick(asks), answer)


TEXTS = (story, story, story, record, record, braces, braces, quotes, quotes)
CHATS = (question, question, question, form, form, repeat, repeat, small_talk)


# ---- files -----------------------------------------------------------------------------------------------------------

# name -> which part of the world, how many rows, and what makes one
FILES: dict[str, tuple[Part, int, tuple[Callable[[Dice], Row], ...]]] = {
    "train": ("train", 1_600, (order,)),
    "heldout": ("heldout", 200, (order,)),
    "text": ("pretrain", 36_000, TEXTS),
    "chats": ("pretrain", 28_000, CHATS),
}


def demo_rows(name: str, seed: int = SEED) -> Iterator[Row]:
    """The rows of one of FILES: the demo's own (`train`, `heldout`), or what its base was trained on (`text`, `chats`)."""
    part, count, makers = FILES[name]
    dice = Dice(f"{seed} {name}", part)
    for _ in range(count):
        yield dice.pick(makers)(dice)


def demo_file(name: str, seed: int = SEED) -> bytes:
    """The same as the bytes of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in demo_rows(name, seed)).encode()
