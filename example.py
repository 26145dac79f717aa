"""Ask a chat model a few questions.

    python example.py [--model PATH_OR_ID]

Without --model: ~/huggingface/Qwen3-0.6B when it is there, else SmolLM2-135M-Instruct, which `make` installs.
"""

import argparse
from pathlib import Path

from nanovllm import LLM, SamplingParams
from nanovllm.utils.checkpoint import default_model

QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about the sea.",
    "Give me three tips for learning a new language.",
]


def choose_model(name: str | None) -> str | Path:
    """The model named, or the best that is here."""
    if name is not None:
        return name
    qwen3 = Path("~/huggingface/Qwen3-0.6B").expanduser()
    return qwen3 if qwen3.is_dir() else default_model()


def main() -> None:
    """Print the questions and their answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder, a .gguf file, or an id on the Hugging Face hub")
    args = parser.parse_args()

    with LLM(choose_model(args.model)) as llm:
        conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
        outputs = llm.chat(conversations, SamplingParams(temperature=0.6, max_tokens=256, seed=0))
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"\nPrompt: {question}\nCompletion: {output['text']}")


if __name__ == "__main__":
    main()
