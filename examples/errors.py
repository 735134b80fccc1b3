"""Tell a whole answer from a broken one: the loop ends only after a whole one, everything else raises APIError.

export OPENAI_BASE_URL=http://127.0.0.1:8900/v1 OPENAI_API_KEY=not-needed
.venv/bin/python examples/errors.py            one answer that is whole, one request that is refused
.venv/bin/python examples/errors.py "text"     the same with a text of yours
"""

import sys

import openai


def ask(client: openai.OpenAI, model: str, text: str) -> None:
    answer = ""
    try:
        stream = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], stream=True)
        for chunk in stream:
            answer += chunk.choices[0].delta.content or ""
    except openai.APIStatusError as error:  # refused: nothing was started
        print(f"refused: {error.status_code} {error.code}: {error.message}")
    except openai.APIError as error:  # broken off: what came so far is not the whole answer
        print(f"broken off after {answer!r}: {error.code}: {error.message}")
    else:
        print(f"whole: {answer!r}")


if __name__ == "__main__":
    with openai.OpenAI() as client:
        ask(client, "endmark", sys.argv[1] if len(sys.argv) > 1 else "Hello")
        ask(client, "no-such-model", "Hello")
