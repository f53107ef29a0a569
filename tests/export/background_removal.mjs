// Runs transformers.js's background-removal pipeline: node background_removal.mjs FOLDER PHOTO OUT DTYPE...
// With HF_ENDPOINT in the environment, FOLDER is the name of a repository on that Hub.
// Writes the alpha channel of the cut-out as raw bytes to OUT.DTYPE.
import { writeFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { env, pipeline } from '@huggingface/transformers';

const [folder, photo, out, ...dtypes] = process.argv.slice(2);
const hub = process.env.HF_ENDPOINT;
if (hub) Object.assign(env, { remoteHost: hub, allowLocalModels: false, cacheDir: `${out}.cache` });
else Object.assign(env, { localModelPath: dirname(folder), allowRemoteModels: false });
const model = hub ? folder : basename(folder);
for (const dtype of dtypes) {
  const remover = await pipeline('background-removal', model, { dtype, device: 'cpu' });
  const cutOut = await remover(photo);
  const pixels = cutOut.width * cutOut.height;
  writeFileSync(`${out}.${dtype}`, Uint8Array.from({ length: pixels }, (_, i) => cutOut.data[4 * i + 3]));
  await remover.dispose();
}
