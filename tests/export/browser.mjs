// Cuts a photo out inside a page: node browser.mjs CHROMIUM PROFILE URL PHOTO OUT
// Writes the alpha channel as raw bytes to OUT, and prints the seconds and the page's peak memory as JSON.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { chromium } from 'playwright-core';

const [executablePath, profile, url, photo, out] = process.argv.slice(2);

/** Peak resident memory in MiB of the largest process that shows a page of this profile. */
function peakMemory() {
  let peak = 0;
  for (const pid of readdirSync('/proc').filter(name => /^\d+$/.test(name))) {
    try {
      const command = readFileSync(`/proc/${pid}/cmdline`, 'utf8');
      if (!command.includes('--type=renderer') || !command.includes(profile)) continue;
      peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))[1]) / 1024);
    } catch (error) {
      if (error.code !== 'ENOENT' && error.code !== 'ESRCH') throw error; // the process has ended meanwhile
    }
  }
  return Math.round(peak);
}

const options = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-component-update',
  '--disable-background-networking', '--disable-sync'];
const browser = await chromium.launchPersistentContext(profile, { executablePath, headless: true, args: options });
try {
  const page = await browser.newPage();
  const problems = [];
  page.on('pageerror', error => problems.push(error.message));
  await page.goto(url);
  const result = await page.evaluate(async bytes => {
    const cutOut = await self.ready;
    const { alpha, seconds } = await cutOut(new Blob([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))]));
    let text = '';
    for (let i = 0; i < alpha.length; i += 32768) text += String.fromCharCode(...alpha.subarray(i, i + 32768));
    return { alpha: btoa(text), seconds, status: document.getElementById('status').textContent };
  }, readFileSync(photo).toString('base64'));
  writeFileSync(out, Buffer.from(result.alpha, 'base64'));
  await page.screenshot({ path: `${out}.png`, fullPage: true });
  console.log(JSON.stringify({ seconds: result.seconds, status: result.status, peak_mib: peakMemory(), problems }));
} finally {
  await browser.close();
}
