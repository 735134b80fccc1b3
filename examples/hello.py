from openai import OpenAI

client = OpenAI()
text = "Every word of this comes back, or you get an error.\n"
stream = client.chat.completions.create(model="endmark", stream=True, messages=[{"role": "user", "content": text}])
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
