// Does calls of the Open Inference Protocol with @grpc/grpc-js: one JSON object a line on standard
// input, one answer a line on standard output. Bytes come as {"$bytes": base64} or {"$file": path}.
"use strict";

const fs = require("fs");
const readline = require("readline");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [, , address, proto] = process.argv;
const options = { keepCase: true, longs: String, enums: String, oneofs: true };
const { inference } = grpc.loadPackageDefinition(loader.loadSync(proto, options));
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());

function bytes(_, value) {
  if (value && value.$bytes !== undefined) return Buffer.from(value.$bytes, "base64");
  if (value && value.$file !== undefined) return fs.readFileSync(value.$file);
  return value;
}

function refusal(error) {
  return { status: grpc.status[error.code], message: error.details };
}

function unary({ method, request, deadline_ms, cancel_ms }) {
  return new Promise((resolve) => {
    const deadline = Date.now() + deadline_ms;
    const call = client[method](request, { deadline }, (error, answer) => {
      resolve(error ? refusal(error) : { answer });
    });
    if (cancel_ms) setTimeout(() => call.cancel(), cancel_ms);
  });
}

function stream({ requests, metadata, deadline_ms }) {
  return new Promise((resolve) => {
    const said = new grpc.Metadata();
    for (const [name, value] of Object.entries(metadata)) said.set(name, value);
    const call = client.ModelStreamInfer(said, { deadline: Date.now() + deadline_ms });
    const answers = [];
    call.on("data", (answer) => {
      answers.push(answer);
      if (answers.length === requests.length) call.end();
    });
    call.on("error", (error) => answers.push(refusal(error)));
    // "close" does not come after an error; the status does, always, and as the last.
    call.on("status", () => setImmediate(() => resolve({ answers })));
    for (const request of requests) call.write(request);
  });
}

async function main() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line, bytes);
    const seen = await (asked.requests ? stream(asked) : unary(asked));
    console.log(JSON.stringify(seen));
  }
  client.close();
}

main();
