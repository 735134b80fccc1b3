// What openai-node makes of responses: prints one JSON object. Run by test_responses_node.py.
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const { everything, failing, hanging } = JSON.parse(process.argv[2]);
const model = "endmark";
const found = {};

async function raised(run) {
  try {
    await run();
    return null;
  } catch (error) {
    return { kind: error.constructor.name, code: error.code };
  }
}

async function drained(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

const whole = await client.responses.create({ model, input: everything });
found.whole = { status: whole.status, text: whole.output_text, items: whole.output.map((item) => item.type) };

const events = await drained(await client.responses.create({ model, input: everything, stream: true }));
found.streamed = { numbers: events.map((event) => event.sequence_number), last: events.at(-1).type };

const helper = client.responses.stream({ model, input: everything });
const helped = await drained(helper);
const final = await helper.finalResponse();
found.helper = { events: helped.length, text: final.output_text, status: final.status };

const seen = 4;
const replay = await client.responses.retrieve(final.id, { stream: true, starting_after: seen });
found.replay = (await drained(replay)).map((event) => event.sequence_number);
const helperReplay = client.responses.stream({ model, response_id: final.id, starting_after: seen });
found.helperReplay = (await drained(helperReplay)).map((event) => event.sequence_number);

found.failedWhole = await raised(() => client.responses.create({ model, input: failing }));
found.failedStream = await raised(async () =>
  drained(await client.responses.create({ model, input: failing, stream: true })),
);
found.failedHelper = await raised(() => client.responses.stream({ model, input: failing }).finalResponse());

const background = await client.responses.create({ model, input: hanging, background: true });
const watched = client.responses.retrieve(background.id, { stream: true }).then(drained);
const cancelled = await client.responses.cancel(background.id);
const last = (await watched).at(-1);
found.cancelled = [background.status, cancelled.status, last.type, last.response.status];
const cancelledHelper = client.responses.stream({ model, response_id: background.id });
found.cancelledHelper = (await drained(cancelledHelper)).at(-1).type;

const items = [];
for await (const item of client.responses.inputItems.list(whole.id)) items.push(item.type);
found.items = items;
await client.responses.delete(whole.id);
found.deleted = await raised(() => client.responses.retrieve(whole.id));

console.log(JSON.stringify(found));
