// Node without any file: the server tells what it has. node node_reflection.cjs localhost:8001 digits 3.png ...
// npm install @grpc/grpc-js grpc-js-reflection-client
"use strict";

const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const { GrpcReflection } = require("grpc-js-reflection-client");

const [server, model, ...names] = process.argv.slice(2);

async function main() {
  const reflection = new GrpcReflection(server, grpc.credentials.createInsecure());
  const found = await reflection.getDescriptorBySymbol("convoy.v1.ImageClassifier");
  const { convoy } = found.getPackageObject({ keepCase: true, longs: String, oneofs: true });
  const client = new convoy.v1.ImageClassifier(server, grpc.credentials.createInsecure());
  const images = names.map((name) => ({ encoded: fs.readFileSync(name) }));
  const deadline = Date.now() + 60_000;
  client.Classify({ model, images, top_k: 1 }, { deadline }, (error, answer) => {
    if (error) throw error;
    answer.results.forEach((result, number) => {
      const [best] = result.classification.labels;
      console.log(names[number], best.name, best.probability.toFixed(4));
    });
    process.exit(0);
  });
}

main();
