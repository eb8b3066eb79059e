"""Word problems of two or three sums with worked solutions in sentences, for a pretrained model.

Every problem has a story, a question and sometimes a request to explain; every solution an opening,
its steps in prose or as a list, and a conclusion whose last number is the answer. Openings, lists
and conclusions are those that the pretrained model itself likes, so that a model which is taught
these solutions keeps much of its style.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

PEOPLE = (
    *(("Anna", "she"), ("Ben", "he"), ("Clara", "she"), ("David", "he"), ("Emma", "she")),
    *(("Jack", "he"), ("Lucy", "she"), ("Maria", "she"), ("Noah", "he"), ("Omar", "he")),
    *(("Rosa", "she"), ("Sam", "he"), ("Sara", "she"), ("Tom", "he")),
)
"""Names and pronouns."""
THINGS = (
    *("apples", "books", "pencils", "marbles", "stickers", "cookies", "coins", "shells"),
    *("cards", "balloons", "oranges", "flowers"),
)
REQUESTS = ("", "", " Explain step by step.", " Show how you got the answer.")
OPENINGS = (
    "To find {goal}, let's go step by step.",
    "Let's solve this problem step by step.",
    "Let's break this down step by step.",
    "To solve this problem, we need to find {goal}.",
)
CONCLUSIONS = ("Therefore, {result}.", "So, {result}.", "The answer is that {result}.")


@dataclass(frozen=True)
class Story:
    """A kind of problem; texts have the numbers and names in braces."""

    texts: tuple[str, ...]
    """Phrasings of the story."""
    questions: tuple[str, ...]
    """Phrasings of the question."""
    goal: str
    """What is asked, as a part of a sentence."""
    steps: tuple[str, ...]
    """Steps of the solution, a sentence each."""
    result: str
    """The answer as a sentence without its full stop; its last number is `answer`."""
    numbers: Callable[[random.Random], dict[str, int]]
    """Draws the numbers of a problem: those given, intermediate results, and `answer`."""


@dataclass(frozen=True)
class WordProblem:
    """A word problem with a worked solution."""

    prompt: str
    answer: str
    solution: str
    kind: str
    """Name of its story."""

    def row(self) -> dict[str, str]:
        """Return the problem as a row of a data file, with the solution as its response."""
        texts = {"prompt": self.prompt, "answer": self.answer, "response": self.solution}
        return texts | {"grader": "numeric"}


def buying_and_giving(generator: random.Random) -> dict[str, int]:
    """Draw a + b = m and m - c = answer."""
    a, b = generator.randint(5, 25), generator.randint(3, 20)
    c = generator.randint(2, a - 1)
    return {"a": a, "b": b, "c": c, "m": a + b, "answer": a + b - c}


def comparing(generator: random.Random) -> dict[str, int]:
    """Draw a + b = m and a + m = answer."""
    a, b = generator.randint(4, 25), generator.randint(2, 15)
    return {"a": a, "b": b, "m": a + b, "answer": 2 * a + b}


def packing(generator: random.Random) -> dict[str, int]:
    """Draw a * b = m and m - c = answer."""
    a, b = generator.randint(3, 9), generator.randint(2, 9)
    c = generator.randint(2, min(15, a * b - 1))
    return {"a": a, "b": b, "c": c, "m": a * b, "answer": a * b - c}


def spending(generator: random.Random) -> dict[str, int]:
    """Draw a * b = m and c - m = answer."""
    a, b = generator.randint(2, 9), generator.randint(2, 9)
    c = a * b + generator.randint(2, 30)
    return {"a": a, "b": b, "c": c, "m": a * b, "answer": c - a * b}


def doubling(generator: random.Random) -> dict[str, int]:
    """Draw 2 * a = m, a + m = k and k - c = answer."""
    a, c = generator.randint(3, 15), generator.randint(2, 8)
    return {"a": a, "c": c, "m": 2 * a, "k": 3 * a, "answer": 3 * a - c}


STORIES = {
    "buying and giving": Story(
        texts=(
            "{name} has {a} {things}. {Pronoun} buys {b} more {things} and then gives {c} {things} "
            "to {friend}.",
            "{name} had {a} {things} and got {b} more from {friend}. Later {pronoun} lost {c} of "
            "the {things}.",
        ),
        questions=(
            "How many {things} does {name} have now?",
            "How many {things} are left for {name}?",
        ),
        goal="how many {things} {name} has at the end",
        steps=(
            "{name} starts with {a} {things} and gets {b} more, so {a} + {b} = {m} {things}.",
            "Then {c} {things} are taken away: {m} - {c} = {answer}.",
        ),
        result="{name} has {answer} {things} left",
        numbers=buying_and_giving,
    ),
    "comparing": Story(
        texts=(
            "{name} has {a} {things}. {friend} has {b} more {things} than {name}.",
            "There are {a} {things} in the bag of {name}. {friend} has {b} more than that.",
        ),
        questions=(
            "How many {things} do {name} and {friend} have together?",
            "How many {things} do they have altogether?",
        ),
        goal="how many {things} {name} and {friend} have together",
        steps=(
            "{friend} has {b} more {things} than {name}, so {friend} has {a} + {b} = {m} {things}.",
            "Together they have {a} + {m} = {answer} {things}.",
        ),
        result="{name} and {friend} have a total of {answer} {things}",
        numbers=comparing,
    ),
    "packing": Story(
        texts=(
            "A box holds {a} {things}. {name} buys {b} boxes and gives {c} {things} to {friend}.",
            "{name} has {b} bags with {a} {things} in each of them. {Pronoun} loses {c} {things}.",
        ),
        questions=(
            "How many {things} does {name} have left?",
            "How many {things} does {pronoun} have now?",
        ),
        goal="how many {things} {name} has left",
        steps=(
            "There are {b} groups of {a} {things}, so {b} * {a} = {m} {things} at the start.",
            "After that {c} {things} are gone: {m} - {c} = {answer}.",
        ),
        result="{name} has {answer} {things} left",
        numbers=packing,
    ),
    "spending": Story(
        texts=(
            "{name} has {c} dollars. {Pronoun} buys {a} {things} that cost {b} dollars each.",
            "At the market {things} cost {b} dollars each. {name} takes {c} dollars along and buys "
            "{a} {things}.",
        ),
        questions=(
            "How many dollars does {name} have left?",
            "How much money, in dollars, is left?",
        ),
        goal="how many dollars {name} has left",
        steps=(
            "The {a} {things} cost {b} dollars each, so {a} * {b} = {m} dollars.",
            "{name} had {c} dollars, so we subtract the cost: {c} - {m} = {answer}.",
        ),
        result="{name} has {answer} dollars left",
        numbers=spending,
    ),
    "doubling": Story(
        texts=(
            "{name} collects {a} {things} on Monday and twice as many on Tuesday. {Pronoun} gives "
            "{c} {things} to {friend}.",
            "On Saturday {name} found {a} {things} and on Sunday twice as many. {c} of the "
            "{things} were lost.",
        ),
        questions=(
            "How many {things} does {name} have left?",
            "How many {things} does {name} have in the end?",
        ),
        goal="how many {things} {name} has left",
        steps=(
            "Twice as many as {a} is 2 * {a} = {m} {things}.",
            "On both days together that makes {a} + {m} = {k} {things}.",
            "Then {c} {things} are taken away: {k} - {c} = {answer}.",
        ),
        result="{name} has {answer} {things} left",
        numbers=doubling,
    ),
}


def draw_problem(generator: random.Random) -> WordProblem:
    """Draw a problem and one of its solutions.

    Args:
        generator: Source of randomness.

    Returns:
        The problem.
    """
    kind = generator.choice(list(STORIES))
    story = STORIES[kind]
    (name, pronoun), (friend, _) = generator.sample(PEOPLE, 2)
    places: dict[str, object] = {"name": name, "friend": friend, "pronoun": pronoun}
    places |= {"Pronoun": pronoun.capitalize(), "things": generator.choice(THINGS)}
    numbers = story.numbers(generator)
    places |= numbers
    request = generator.choice(REQUESTS)
    prompt = f"{generator.choice(story.texts)} {generator.choice(story.questions)}{request}"
    opening, conclusion = generator.choice(OPENINGS), generator.choice(CONCLUSIONS)
    if generator.random() < 0.5:
        steps = " ".join(story.steps)
        solution = f"{opening} {steps} {conclusion}"
    else:
        steps = "\n".join(f"{i}. {step}" for i, step in enumerate(story.steps, 1))
        solution = f"{opening}\n\n{steps}\n\n{conclusion}"
    solution = solution.replace("{goal}", story.goal).replace("{result}", story.result)
    return WordProblem(
        prompt=prompt.format(**places),
        answer=str(numbers["answer"]),
        solution=solution.format(**places),
        kind=kind,
    )


def draw_splits(sizes: dict[str, int], seed: int) -> dict[str, list[WordProblem]]:
    """Draw problems for several splits, all of them different.

    Args:
        sizes: Number of problems of each split.
        seed: Seed of the problems.

    Returns:
        The problems of each split.
    """
    generator, problems = random.Random(f"word problems {seed}"), dict[str, WordProblem]()
    while len(problems) < sum(sizes.values()):
        problem = draw_problem(generator)
        problems.setdefault(problem.prompt, problem)
    remaining = iter(problems.values())
    return {split: [next(remaining) for _ in range(size)] for split, size in sizes.items()}
