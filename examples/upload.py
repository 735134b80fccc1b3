"""Send files: as parts of a message, the OpenAI way, or as a form, the way nanobot's own server takes them.

export OPENAI_BASE_URL=http://127.0.0.1:8900/v1 OPENAI_API_KEY=not-needed
.venv/bin/python examples/upload.py
"""

import base64

from openai import OpenAI
from openai.types.chat import ChatCompletion

NOTES = b"Milk, bread, apples."

client = OpenAI()

data_url = "data:text/plain;base64," + base64.b64encode(NOTES).decode()
in_message = client.chat.completions.create(
    model="endmark",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is on my list?"},
                {"type": "file", "file": {"filename": "list.txt", "file_data": data_url}},
            ],
        }
    ],
)
print("in the message:", in_message.choices[0].message.content)

as_form = client.post(
    "/chat/completions",
    cast_to=ChatCompletion,
    body={"message": "What is on my list?", "session_id": "shopping"},
    files=[("files", ("list.txt", NOTES, "text/plain"))],
    options={"headers": {"Content-Type": "multipart/form-data"}},
)
print("as a form:", as_form.choices[0].message.content)
