// Vercel's ai, with @ai-sdk/openai-compatible.
import { CITIES, QUESTION, UNITS, call, isWeather, key, model, require, url, versionOf } from "./report.mjs";

const ai = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");
const version = versionOf("ai");
const provider = createOpenAICompatible({
  name: "prefixd", baseURL: url, apiKey: key, supportsStructuredOutputs: true,
});
const schema = z.object({ city: z.enum(CITIES), unit: z.enum(UNITS) });
const fields = {
  model: provider(model), prompt: QUESTION, temperature: 0, maxOutputTokens: 96, maxRetries: 0,
};
const tools = { weather: ai.tool({ description: "The weather in a city.", inputSchema: schema }) };

await call(version, "generateText", async () => (await ai.generateText(fields)).text);
await call(version, "streamText", async () => {
  let text = "";
  for await (const part of ai.streamText(fields).textStream) text += part;
  return text;
});
await call(version, "generateText, tools", async () => {
  const answer = await ai.generateText({ ...fields, tools, toolChoice: "required" });
  return isWeather(answer.toolCalls[0].input);
});
await call(version, "streamText, tools", async () => {
  const toolChoice = { type: "tool", toolName: "weather" };
  const answer = ai.streamText({ ...fields, tools, toolChoice });
  return isWeather((await answer.toolCalls)[0].input);
});
await call(version, "generateObject", async () => {
  return isWeather((await ai.generateObject({ ...fields, schema })).object);
});
