// trialign._host: what the host does at every step of a rollout, and packs before every update. Objects, so pybind11
// (torch's own copy of it) and not torch's stable ABI, as the ops of trialign._C have it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "micro_batch.h"
#include "scheduler.h"

namespace py = pybind11;

namespace trialign {
namespace {

// A marker that engine/host.py reads from the file before it loads the module, as for trialign._C.
[[gnu::used]] const char kFacts[] = "trialign._host built from <" TRIALIGN_SOURCES "> for torch <" TRIALIGN_TORCH ">";

const char* name_of(Finish finish) {
  switch (finish) {
    case Finish::stop: return "stop";
    case Finish::length: return "length";
    case Finish::abort: return "abort";
    default: return "";
  }
}

template <typename T>
py::array_t<T> table(const std::vector<T>& values, py::ssize_t columns) {
  py::array_t<T> array({static_cast<py::ssize_t>(values.size()) / columns, columns});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

struct NewRows {
  py::array_t<int64_t> state;
  py::array_t<int32_t> tables;
  py::array_t<int64_t> stop_ids;
  py::array_t<float> sampling;
  py::array_t<int32_t> top_k;
};

NewRows new_rows(const Step& step, int64_t width, int64_t stop_ids) {
  const int64_t rows = step.size() - step.kept;
  for (int64_t i = 0; i < rows; ++i)
    stop_ids = std::max<int64_t>({stop_ids, 1, static_cast<int64_t>(step.rows[step.kept + i]->params.stop_ids.size())});
  NewRows out{py::array_t<int64_t>({int64_t{5}, rows}), py::array_t<int32_t>({rows, width}),
              py::array_t<int64_t>({rows, stop_ids}), py::array_t<float>({int64_t{2}, rows}),
              py::array_t<int32_t>(rows)};
  auto state = out.state.mutable_unchecked<2>();
  auto tables = out.tables.mutable_unchecked<2>();
  auto stops = out.stop_ids.mutable_unchecked<2>();
  auto sampling = out.sampling.mutable_unchecked<2>();
  auto top_k = out.top_k.mutable_unchecked<1>();
  for (int64_t i = 0; i < rows; ++i) {
    const Sequence& sequence = *step.rows[step.kept + i];
    const Params& params = sequence.params;
    const auto blocks = static_cast<int64_t>(sequence.blocks.size()), own = static_cast<int64_t>(params.stop_ids.size());
    state(0, i) = sequence.prompt.back();
    state(1, i) = sequence.length();
    state(2, i) = static_cast<int64_t>(sequence.tokens.size());
    state(3, i) = sequence.key;
    state(4, i) = own ? params.min_new_tokens : 0;
    for (int64_t j = 0; j < width; ++j) tables(i, j) = static_cast<int32_t>(j < blocks ? sequence.blocks[j] : step.spare);
    for (int64_t j = 0; j < stop_ids; ++j) stops(i, j) = own ? params.stop_ids[j < own ? j : 0] : 0;
    sampling(0, i) = static_cast<float>(params.temperature);
    sampling(1, i) = static_cast<float>(params.top_p);
    top_k(i) = static_cast<int32_t>(params.top_k);
  }
  return out;
}

struct Prefill {
  py::array_t<int64_t> tokens, starts;
  int64_t longest;
};

Prefill prefill(const Step& step) {
  const int64_t rows = step.size() - step.decoding, count = step.tokens - step.decoding;
  Prefill out{py::array_t<int64_t>({int64_t{3}, count}), py::array_t<int64_t>(rows + 1), 0};
  int64_t* tokens = out.tokens.mutable_data();
  auto starts = out.starts.mutable_unchecked<1>();
  starts(0) = 0;
  for (int64_t i = 0, at = 0; i < rows; ++i) {
    const Sequence& sequence = *step.rows[step.decoding + i];
    const int64_t length = sequence.length();
    for (int64_t position = 0; position < length; ++position, ++at) {
      tokens[at] = sequence.token(position);
      tokens[count + at] = position;
      tokens[2 * count + at] = sequence.blocks[position / step.block_size] * step.block_size + position % step.block_size;
    }
    starts(i + 1) = at;
    out.longest = std::max(out.longest, length);
  }
  return out;
}

void add(Scheduler& scheduler, int64_t id, std::vector<int64_t> prompt, const py::object& params, int64_t key) {
  auto number = [&](const char* name) { return params.attr(name).cast<int64_t>(); };
  Params own{number("max_new_tokens"), number("min_new_tokens"), number("top_k"),
             params.attr("temperature").cast<double>(), params.attr("top_p").cast<double>(),
             params.attr("stop_ids").cast<std::vector<int64_t>>()};
  scheduler.add(id, std::move(prompt), std::move(own), key);
}

void commit(Scheduler& scheduler, const Step& step, const py::array_t<double, py::array::c_style>& results,
            int64_t version) {
  if (results.ndim() != 2 || results.shape(0) != step.size() || results.shape(1) != 2)
    throw std::logic_error("a step's result does not match its rows");
  scheduler.commit(step, results.data(), version);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  py::class_<Sequence, std::shared_ptr<Sequence>>(module, "Sequence")
      .def_readonly("id", &Sequence::id)
      .def_readonly("prompt", &Sequence::prompt)
      .def_readonly("tokens", &Sequence::tokens)
      .def_readonly("logprobs", &Sequence::logprobs)
      .def_readonly("versions", &Sequence::versions)
      .def_readonly("blocks", &Sequence::blocks)
      .def_readonly("planned", &Sequence::planned)
      .def_property_readonly("length", &Sequence::length)
      .def_property_readonly("finish", [](const Sequence& s) { return name_of(s.finish); });
  py::class_<NewRows>(module, "NewRows")
      .def_readonly("state", &NewRows::state)
      .def_readonly("tables", &NewRows::tables)
      .def_readonly("stop_ids", &NewRows::stop_ids)
      .def_readonly("sampling", &NewRows::sampling)
      .def_readonly("top_k", &NewRows::top_k);
  py::class_<Prefill>(module, "Prefill")
      .def_readonly("tokens", &Prefill::tokens)
      .def_readonly("starts", &Prefill::starts)
      .def_readonly("longest", &Prefill::longest);
  py::class_<Step, std::shared_ptr<Step>>(module, "Step")
      .def_readonly("rows", &Step::rows)
      .def_readonly("kept", &Step::kept)
      .def_readonly("decoding", &Step::decoding)
      .def_readonly("tokens", &Step::tokens)
      .def_property_readonly("size", &Step::size)
      .def_property_readonly("masked", &Step::masked)
      .def_property_readonly(
          "moved",
          [](const Step& s) -> py::object {
            if (s.in_place) return py::none();
            return py::array_t<int64_t>(s.kept, s.moved.data());
          })
      .def_property_readonly("copies", [](const Step& s) { return table(s.copies, 2); })
      .def_property_readonly("grown", [](const Step& s) { return table(s.grown, 3); })
      .def("new_rows", &new_rows, py::arg("width"), py::arg("stop_ids"))
      .def("prefill", &prefill);
  py::class_<BlockPool>(module, "BlockPool")
      .def_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("free_blocks", &BlockPool::free_blocks);
  py::class_<Scheduler>(module, "Scheduler")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t>(), py::arg("block_size"), py::arg("num_blocks"),
           py::kw_only(), py::arg("max_running"), py::arg("prefill_tokens"), py::arg("lanes") = 1)
      .def_readonly("block_size", &Scheduler::block_size)
      .def_readonly("pool", &Scheduler::pool)
      .def_property_readonly("waiting", [](const Scheduler& s) { return Rows(s.waiting.begin(), s.waiting.end()); })
      .def_readonly("running", &Scheduler::running)
      .def_readonly("alive", &Scheduler::alive)
      .def_readonly("preemptions", &Scheduler::preemptions)
      .def_readonly("lane_size", &Scheduler::lane_size)
      .def_readonly("width", &Scheduler::width)
      .def_readonly("done", &Scheduler::done)
      .def_readonly("total", &Scheduler::total)
      .def_property_readonly("idle", &Scheduler::idle)
      .def("reset", &Scheduler::reset)
      .def("blocks_of", &Scheduler::blocks_of, py::arg("prompt"), py::arg("max_new_tokens"))
      .def("add", &add, py::arg("id"), py::arg("prompt"), py::arg("params"), py::arg("key"))
      .def("abort", &Scheduler::abort, py::arg("ids") = py::none())
      .def("retire", &Scheduler::retire, py::arg("lane"))
      .def("plan", &Scheduler::plan, py::arg("lane"))
      .def("commit", &commit, py::arg("step"), py::arg("results"), py::arg("version"))
      .def("take_ended", &Scheduler::take_ended)
      .def("requeue", py::overload_cast<>(&Scheduler::requeue));
  module.def("micro_batches", &micro_batches, py::arg("rows"), py::arg("lengths"), py::arg("size"),
             py::arg("max_tokens"), py::arg("by_length"));
  module.def("deal_micro_batches", &deal_micro_batches, py::arg("rows"), py::arg("lengths"), py::arg("parts"),
             py::arg("rank"), py::arg("size"), py::arg("max_tokens"));
}

}  // namespace trialign
