"""Paraphrases: what a pointless operation does. They add no information. Tables only.

No prefix holds a word that could tell a kind (`words.FAMILIES`).
"""

PREFIXES = {
    "imperative": (
        "Please ",
        "Kindly ",
        "If you don't mind, ",
        "As soon as time allows, ",
        "I'd like you to ",
        "I need you to ",
        "Be so kind as to ",
        "Take a moment to ",
        "You have my thanks if you ",
    ),
    "question": (
        "A quick question: ",
        "One thing puzzles me: ",
        "Out of curiosity: ",
        "I have been wondering: ",
        "Here goes my question: ",
        "For my own understanding: ",
        "A question that keeps coming up: ",
    ),
    "other": (
        "A small request: ",
        "My request: ",
        "Here comes a task: ",
        "I need your help: ",
        "Something for you: ",
        "A task for today: ",
        "The task: ",
    ),
}
SUFFIXES = (
    " Thank you.",
    " Thanks in advance.",
    " Many thanks.",
    " Much appreciated.",
    " Thanks for your help.",
    " Thank you very much.",
    " Take your time.",
)
COPIED = "Here is the rewritten prompt: {text}"
"""A deliberate fault: elimination rule 4 looks for this phrase."""
