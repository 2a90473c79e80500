// What a script of a JavaScript client prints: as report.py.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { parseArgs } from "node:util";

const { values } = parseArgs({
  options: { url: { type: "string" }, key: { type: "string" }, model: { type: "string" } },
});
export const url = `${values.url}/v1`;
export const { key, model } = values;
export const QUESTION = "What is the weather in Oslo, in celsius?";
export const CITIES = ["Oslo", "Rome", "Lima"];
export const UNITS = ["celsius", "fahrenheit"];
export const require = createRequire(`${process.cwd()}/`);

export function versionOf(name) {
  return JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8")).version;
}

export function isWeather({ city, unit }) {
  return CITIES.includes(city) && UNITS.includes(unit);
}

export async function call(version, name, check) {
  let reason = "";
  try {
    const result = await check();
    if (!result) reason = `unexpected: ${JSON.stringify(result)}`;
  } catch (error) {
    reason = String(error).slice(0, 400);
    process.exitCode = 1;
  }
  if (reason) process.exitCode = 1;
  console.log(JSON.stringify({ call: name, ok: !reason, version, reason }));
}
