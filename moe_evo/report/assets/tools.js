// What the other scripts of the page use: its data, elements, numbers and colours.
"use strict";

const index = JSON.parse(document.getElementById("index").textContent);

/** A new element; children are elements or text, and text is never read as HTML. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const unpacked = new Map();

/** The data of one run, unpacked once. */
function runData(number) {
  if (!unpacked.has(number)) unpacked.set(number, unpack(document.getElementById(`data-${number}`).textContent));
  return unpacked.get(number);
}

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const decimals = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/** Fitness and interval as in the tables; one value alone has no interval. */
function intervalText(interval) {
  if (!interval) return "–";
  const [value, low, high] = interval;
  return low === undefined ? decimals(value) : `${decimals(value)} [${decimals(low)}, ${decimals(high)}]`;
}

const operatorName = (operator) => operator.replaceAll("_", " ");

/** A colour of the style sheet, which knows light and dark. */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function fillSelect(select, names, chosen) {
  select.replaceChildren(...names.map(([value, text]) => element("option", { value }, text)));
  select.value = String(chosen);
}

/** Put text on the clipboard, also from a file on disk. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { readonly: "" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
