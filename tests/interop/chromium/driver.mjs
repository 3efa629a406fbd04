// Drives one page of a headless Chromium: a line of JSON in, a line of JSON out. `browsing.py` speaks with it.
//
//   node driver.mjs [EXECUTABLE]      without one: the Chromium inside @sparticuz/chromium, unpacked into $TMPDIR

import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import chromium, { inflate } from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const POLL_MS = 25;
const FLAGS = ["--no-sandbox", "--disable-gpu", "--no-zygote", "--hide-scrollbars", "--font-render-hinting=none"];

const LIBRARIES = new URL("../bin/al2023.tar.br", import.meta.resolve("@sparticuz/chromium"));

async function launched() {
  chromium.setGraphicsMode = false;
  const executablePath = process.argv[2] ?? (await chromium.executablePath());
  const launch = (env) => puppeteer.launch({ executablePath, headless: "shell", args: FLAGS, env });
  try {
    return await launch(process.env);
  } catch (error) {
    if (process.argv[2] || !String(error).includes("loading shared libraries")) throw error;
    // A bare machine has no NSS: the package brings the libraries, and unpacks them by itself on Amazon's machines only.
    // They come last, so that what the machine has is its own.
    await inflate(fileURLToPath(LIBRARIES));
    const paths = [process.env.LD_LIBRARY_PATH, join(tmpdir(), "al2023", "lib")].filter(Boolean);
    return launch({ ...process.env, LD_LIBRARY_PATH: paths.join(":") });
  }
}

const browser = await launched();
const page = await browser.newPage();
const said = []; // what the page's console and its errors said
page.on("console", (message) => ["error", "warn"].includes(message.type()) && said.push(message.text()));
page.on("pageerror", (error) => said.push(String(error)));
page.on("dialog", (dialog) => { said.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });

async function settled(expression, deadline_ms) {
  const until = performance.now() + deadline_ms;
  for (;;) {
    const value = await page.evaluate(expression);
    if (value || performance.now() > until) return value ?? null;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

const commands = {
  goto: ({ url }) => page.goto(url, { waitUntil: "domcontentloaded" }).then((response) => response?.headers() ?? {}),
  value: ({ expression }) => page.evaluate(expression),
  until: ({ expression, deadline_ms }) => settled(expression, deadline_ms),
  click: ({ selector }) => page.click(selector),
  type: ({ selector, text }) => page.type(selector, text),
  press: ({ key }) => page.keyboard.press(key),
  look: async ({ width, height, dark, phone, scale }) => {
    await page.setViewport({ width, height, deviceScaleFactor: scale ?? 1, isMobile: Boolean(phone) });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }]);
  },
  screenshot: ({ path, whole }) => page.screenshot({ path, fullPage: Boolean(whole) }).then(() => path),
  said: () => said.splice(0),
};

console.log(JSON.stringify({ value: await browser.version() }));
for await (const line of createInterface({ input: process.stdin })) {
  const { what, ...options } = JSON.parse(line);
  try {
    console.log(JSON.stringify({ value: (await commands[what](options)) ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error) }));
  }
}
await browser.close();
