// The description of the API, out of openapi.json.

import { byId, call, element } from "./api.js";

const EXAMPLES = {
  "/v1/chat/completions": { model: null, stream: true, messages: [{ role: "user", content: "Convert 3 kilometres to metres." }] },
  "/v1/completions": { prompt: "Convert 3 kilometres to metres.\n", max_tokens: 32 },
  "/v1/route": { prompt: "Convert 3 kilometres to metres." },
  "/tokenize": { prompt: "Convert 3 kilometres to metres." },
  "/detokenize": { tokens: [1, 2, 3] },
  "/v1/load_lora_adapter": { lora_name: "units", lora_path: "units", examples: [{ prompt: "3 km in m?", answer: "3000 m" }] },
  "/v1/unload_lora_adapter": { lora_name: "units" },
};

function kindOf(schema, parts) {
  if (!schema) return "anything";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return [...new Set(choices.map((one) => kindOf(one, parts)))].filter((kind) => kind !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kindOf(schema.items, parts)}`;
  return schema.type ?? "anything";
}

function fields(name, parts, seen = new Set()) {
  const schema = parts[name];
  if (!schema?.properties || seen.has(name)) return [];
  const isBody = !seen.size;
  seen.add(name);
  const rows = Object.entries(schema.properties).map(([field, one]) =>
    element("tr", {},
      element("td", {}, element("code", { text: field }), schema.required?.includes(field) ? " (needed)" : ""),
      element("td", { text: kindOf(one, parts) }),
      element("td", { text: one.description ?? "" })));
  const head = element("tr", {}, ...["field", "kind", "meaning"].map((text) => element("th", { text, scope: "col" })));
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  const refs = JSON.stringify(schema.properties).match(/#\/components\/schemas\/(\w+)/g) ?? [];
  const parts_ = [...new Set(refs.map((ref) => ref.split("/").at(-1)))].flatMap((ref) => fields(ref, parts, seen));
  return [element("details", { open: isBody }, element("summary", { text: name }), table), ...parts_];
}

function section(path, way, route, parts) {
  const made = element("section", {}, element("h2", {}, element("span", { classes: "way", text: way.toUpperCase() }), element("code", { text: path })));
  made.append(element("p", { text: route.description ?? route.summary ?? "" }));
  if (EXAMPLES[path]) {
    const body = JSON.stringify(EXAMPLES[path]).replaceAll("'", "'\\''").replace('"model":null,', "");
    made.append(element("pre", { text: `curl -N ${location.origin}${path} -H 'Content-Type: application/json' -d '${body}'` }));
  }
  const name = route.requestBody?.content["application/json"]?.schema?.$ref?.split("/").at(-1);
  if (name) made.append(...fields(name, parts));
  return made;
}

try {
  const api = await (await call("/openapi.json")).json();
  const routes = Object.entries(api.paths).flatMap(([path, ways]) =>
    Object.entries(ways).map(([way, route]) => section(path, way, route, api.components.schemas)));
  byId("routes").replaceChildren(
    element("p", { text: `${api.info.summary} Version ${api.info.version}.` }),
    element("p", {}, "If the server has keys, add ", element("code", { text: "-H 'Authorization: Bearer KEY'" }), "."),
    ...routes);
} catch (error) {
  byId("status").textContent = error.message;
}
