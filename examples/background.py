"""Ask in the background, go away, come back: the stream goes on where it was left, on any replica.

export OPENAI_BASE_URL=http://127.0.0.1:8900/v1 OPENAI_API_KEY=not-needed
.venv/bin/python examples/background.py "text"
"""

import sys

import openai


def main(client: openai.OpenAI, text: str) -> None:
    stream = client.responses.create(model="endmark", input=text, background=True, stream=True)
    created = next(stream)  # names the response, and is number 0
    stream.close()  # a train enters a tunnel; the agent does not notice

    response_id, seen = created.response.id, created.sequence_number
    for event in client.responses.retrieve(response_id, stream=True, starting_after=seen):
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
    print()

    response = client.responses.retrieve(response_id)
    print(f"{response.status}, {response.usage.total_tokens} tokens")

    further = client.responses.create(model="endmark", input="And then?", previous_response_id=response_id)
    print(further.output_text)


if __name__ == "__main__":
    with openai.OpenAI() as client:
        main(client, sys.argv[1] if len(sys.argv) > 1 else "Every word of this comes back.")
