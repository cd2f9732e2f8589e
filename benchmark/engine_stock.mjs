// llama.cpp out of the npm package node-llama-cpp, whose prebuilt library picks the CPU's best instruction set; the protocol
// of engine_worker.py. usage: node engine_stock.mjs MODEL.gguf THREADS (run where node_modules has the package)
import {createInterface} from "node:readline";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const [modelPath, threads] = [process.argv[2], Number(process.argv[3])];
const llama = await getLlama({build: "never", gpu: false, progressLogs: false, logLevel: "error", maxThreads: threads});
const model = await llama.loadModel({modelPath, useMmap: true});
const context = await model.createContext({contextSize: 1536, batchSize: 512, threads, sequences: 1});
const sequence = context.getSequence();
let state = 1;
const token = () => 1 + (state = (state * 48271) % 2147483647) % 30000;

async function prefill(count) {
    await sequence.clearHistory();
    await sequence.evaluateWithoutGeneratingNewTokens(Array.from({length: count}, token));
}

async function decode(count) {
    let produced = 0;
    for await (const _ of sequence.evaluate([1], {temperature: 0, yieldEogToken: true}))
        if (++produced === count) break;
    if (produced !== count) throw new Error(`asked for ${count} tokens, got ${produced}`);
}

console.log(JSON.stringify({ready: 1}));
for await (const line of createInterface({input: process.stdin})) {
    const task = JSON.parse(line);
    if (task.decode) await prefill(task.context);
    const cpu = process.cpuUsage(), wall = performance.now();
    await (task.decode ? decode(task.decode) : prefill(task.prefill));
    const used = process.cpuUsage(cpu);
    console.log(JSON.stringify({cpu: (used.user + used.system) / 1e6, wall: (performance.now() - wall) / 1e3}));
}
