// The openai package of JavaScript.
import { CITIES, QUESTION, UNITS, call, isWeather, key, model, require, url, versionOf } from "./report.mjs";

const OpenAI = require("openai").default ?? require("openai");
const version = versionOf("openai");
const client = new OpenAI({ baseURL: url, apiKey: key });
const schema = {
  type: "object",
  properties: { city: { enum: CITIES }, unit: { enum: UNITS } },
  required: ["city", "unit"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters: schema } }];
const messages = [{ role: "user", content: QUESTION }];
const fields = { model, messages, temperature: 0, max_tokens: 96 };
const named = { type: "function", function: { name: "weather" } };

await call(version, "chat.completions", async () => {
  const answer = await client.chat.completions.create(fields);
  return answer.choices[0].message.content;
});
await call(version, "chat.completions, streamed", async () => {
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...fields, stream: true })) {
    text += chunk.choices[0]?.delta.content ?? "";
  }
  return text;
});
await call(version, "tools, required", async () => {
  const answer = await client.chat.completions.create({
    ...fields, tools, tool_choice: "required",
  });
  return isWeather(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments));
});
await call(version, "tools, streamed", async () => {
  const stream = client.chat.completions.stream({ ...fields, tools, tool_choice: named });
  const { choices } = await stream.finalChatCompletion();
  return isWeather(JSON.parse(choices[0].message.tool_calls[0].function.arguments));
});
await call(version, "response_format", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "weather", schema } };
  const answer = await client.chat.completions.parse({ ...fields, response_format });
  return isWeather(JSON.parse(answer.choices[0].message.content));
});
