// Node with the .proto file: node node_proto.cjs localhost:8001 digits 3.png ...
// npm install @grpc/grpc-js @grpc/proto-loader; and protos/classifier.proto of Convoy beside it, or
// where PROTO says.
"use strict";

const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [server, model, ...names] = process.argv.slice(2);
const file = process.env.PROTO || "classifier.proto";
const definition = loader.loadSync(file, { keepCase: true, longs: String, oneofs: true });
const { ImageClassifier } = grpc.loadPackageDefinition(definition).convoy.v1;

const client = new ImageClassifier(server, grpc.credentials.createInsecure());
const images = names.map((name) => ({ encoded: fs.readFileSync(name) }));
const deadline = Date.now() + 60_000;
client.Classify({ model, images, top_k: 1 }, { deadline }, (error, answer) => {
  if (error) throw error;
  answer.results.forEach((result, number) => {
    // Each image fails alone.
    if (result.error) return console.log(names[number], result.error.message);
    const [best] = result.classification.labels;
    console.log(names[number], best.name, best.probability.toFixed(4));
  });
  client.close();
});
