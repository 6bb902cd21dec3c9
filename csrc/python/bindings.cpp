// _C: introspection for Python. The only torch header is DLPack's, so the module depends on no torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <optional>
#include <variant>

#include "../introspect.h"
#include "../train/block.h"
#include "freshness.h"
#include "passes.h"

namespace py = pybind11;

namespace {

using Ints = std::vector<int64_t>;

mnv2::DType dtype_from(const std::string& name) {
  std::string names;
  for (const mnv2::DType dtype : mnv2::kDTypes) {
    if (name == mnv2::name_of(dtype)) return dtype;
    names.append(names.empty() ? "" : ", ").append(mnv2::name_of(dtype));
  }
  throw std::invalid_argument("plan: dtype must be one of " + names + ", got " + name);
}

// x: n, h, w, c
mnv2::ImageSize size_from(const std::array<int64_t, 4>& x) { return {x[0], x[1], x[2], x[3]}; }

// Plans do not depend on the bounds of an activation, so any will do.
constexpr mnv2::Activation kRelu6{0.f, 6.f};

template <size_t size>
const int64_t* fields_of(const char* unit, const char* const (&fields)[size], const Ints& values) {
  if (values.size() == size) return values.data();
  std::string names;
  for (const char* field : fields) names.append(names.empty() ? "" : ", ").append(field);
  throw std::invalid_argument(std::string("plan: ") + unit + " must be (" + names + "), got " +
                              std::to_string(values.size()) + " values");
}

mnv2::BlockShape block_from(const std::array<int64_t, 4>& x, const Ints& block) {
  return mnv2::block_from(size_from(x), fields_of("block", mnv2::kBlockFields, block), kRelu6);
}

py::dict cpu_plan(const std::array<int64_t, 4>& x, const Ints& block, int64_t threads, const std::string& dtype,
                  int64_t l1, int64_t l2) {
  const mnv2::BlockShape shape = block_from(x, block);
  mnv2::Machine machine = mnv2::cpu_machine(threads);
  if (l1 > 0) machine.l1 = l1;
  if (l2 > 0) machine.l2 = l2;
  const mnv2::BlockPlan plan = mnv2::cpu_plan(shape, dtype_from(dtype), machine);
  py::dict d;
  d["isa"] = mnv2::cpu_isa();
  d["l1"] = machine.l1;
  d["l2"] = machine.l2;
  d["h_out"] = mnv2::h_out(shape);
  d["w_out"] = mnv2::w_out(shape);
  d["chunk"] = mnv2::kChunk;
  d["rows"] = plan.rows;
  d["ring_rows"] = plan.ring_rows;
  d["strips"] = plan.strips;
  d["columns"] = plan.columns;
  d["halo"] = mnv2::halo(shape);
  d["groups"] = plan.groups;
  d["group_sets"] = plan.group_sets;
  d["tasks"] = shape.n * plan.strips * plan.columns * plan.group_sets;
  d["scratch_bytes"] = 4 * plan.scratch;
  d["shared_bytes"] = 4 * plan.shared;
  d["macs"] = mnv2::macs(shape);
  return d;
}

py::dict cpu_network_plan(const std::array<int64_t, 4>& x, const std::string& units, const std::string& bounds,
                          int64_t threads, const std::string& dtype) {
  const mnv2::NetworkFacts facts =
      mnv2::cpu_network_plan(size_from(x), {units, bounds}, dtype_from(dtype), mnv2::cpu_machine(threads));
  py::dict d;
  d["fused_stem"] = facts.fused_stem;
  d["steps"] = facts.steps;
  d["images_at_a_time"] = facts.slice;
  d["steps_for_a_few_images"] = facts.large;
  d["arena_bytes"] = facts.arena_bytes;
  return d;
}

py::dict cuda_launch(const mnv2::CudaLaunch& launch) {
  const mnv2::cuda::BlockPlan& plan = launch.plan;
  const mnv2::cuda::Grid& grid = launch.grid;
  py::dict d;
  d["name"] = launch.name;
  d["grid"] = std::array<int64_t, 3>{grid.x, grid.y, grid.z};
  d["threads"] = grid.threads;
  d["shared_bytes"] = grid.shared;
  d["cycles"] = launch.load.cycles;
  d["shared_cycles"] = launch.load.shared;
  d["tensor_cycles"] = launch.load.tensor;
  d["issue_cycles"] = launch.load.issue;
  d["memory_bytes"] = launch.load.bytes;
  if (launch.shape.kernel == 0) return d;
  const mnv2::BlockShape& s = launch.shape;
  d["input"] = std::array<int64_t, 3>{s.h, s.w, s.c_in};
  d["hidden"] = s.c_hidden;
  d["output"] = std::array<int64_t, 3>{mnv2::h_out(s), mnv2::w_out(s), s.c_out};
  d["residual"] = s.residual;
  d["fits"] = plan.fits;
  d["tile_h"] = plan.tile_h;
  d["tile_w"] = plan.tile_w;
  d["images"] = plan.images;
  d["rounds"] = plan.rounds;
  d["splits"] = plan.splits;
  d["buffers"] = plan.buffers;
  d["column_parts"] = plan.columns.parts;
  d["column_tiles"] = plan.columns.tiles;
  d["blocks"] = plan.blocks;
  d["blocks_at_once"] = plan.at_once;
  d["partial_bytes"] = 4 * plan.partial;
  d["tickets"] = plan.tickets;
  return d;
}

py::dict cuda_plan(const std::array<int64_t, 4>& x, const Ints& block, const std::string& dtype,
                   const std::string& device, bool exact, const std::optional<mnv2::cuda::ChosenTile>& tile) {
  return cuda_launch(mnv2::cuda_plan(block_from(x, block), dtype_from(dtype), exact, device, tile));
}

py::dict cuda_network_plan(const std::array<int64_t, 4>& x, const std::string& units, const std::string& bounds,
                           const std::string& dtype, const std::string& device, bool exact) {
  const mnv2::CudaNetworkFacts facts =
      mnv2::cuda_network_plan(size_from(x), {units, bounds}, dtype_from(dtype), exact, device);
  py::dict d;
  d["fits"] = facts.fits;
  d["joined"] = facts.joined;
  d["memory_bytes"] = facts.memory_bytes;
  d["packed_bytes"] = facts.packed_bytes;
  py::list launches;
  for (const mnv2::CudaLaunch& launch : facts.launches) launches.append(cuda_launch(launch));
  d["launches"] = launches;
  return d;
}

// Why the operator cannot run; None if it can.
std::optional<std::string> cuda_unfit(const std::string& op, const std::array<int64_t, 4>& size,
                                      const std::variant<Ints, std::string>& given, const std::string& dtype_name,
                                      int64_t shared_block_bytes) {
  const std::string* units = std::get_if<std::string>(&given);
  if ((op == "network") != (units != nullptr))
    throw std::invalid_argument("cuda_unfit: fields must be a list of integers, for a network a text of them");
  const mnv2::ImageSize x = size_from(size);
  const mnv2::DType dtype = dtype_from(dtype_name);
  std::string why;
  if (units) {
    why = mnv2::cuda_unfit(x, {*units, mnv2::any_bounds(*units)}, dtype, shared_block_bytes);
  } else if (const Ints& fields = std::get<Ints>(given); op == "inverted_residual") {
    const int64_t* block = fields_of("block", mnv2::kBlockFields, fields);
    why = mnv2::cuda_unfit(mnv2::block_from(x, block, kRelu6), dtype, shared_block_bytes);
  } else if (op == "dense") {
    why = mnv2::cuda_unfit(mnv2::dense_from(x, fields_of("dense", mnv2::kDenseFields, fields), kRelu6), dtype);
  } else if (op == "head") {
    why = mnv2::cuda_unfit(mnv2::head_from(x, fields_of("head", mnv2::kHeadFields, fields), kRelu6));
  } else {
    throw std::invalid_argument("cuda_unfit: no operator " + op);
  }
  return why.empty() ? std::nullopt : std::optional<std::string>(why);
}

py::dict cuda_device(const std::string& name) {
  const mnv2::cuda::Device device = mnv2::cuda_device(name);
  py::dict d;
  d["multiprocessors"] = device.multiprocessors;
  d["shared_block_bytes"] = device.shared_block;
  d["shared_bytes"] = device.shared_all;
  return d;
}

template <size_t size>
py::tuple names_of(const char* const (&fields)[size]) {
  py::tuple names(size);
  for (size_t i = 0; i < size; ++i) names[i] = fields[i];
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of mnv2_fused: build, ISA, tile plans, scratch memory, changes of weights.";
  m.def(
      "build_info",
      [] {
        py::dict d;
        for (const auto& [name, value] : mnv2::build_info()) d[py::str(name)] = value;
        return d;
      },
      "Facts about the build, by name.");
  m.def("cpu_isa", &mnv2::cpu_isa, "Name of the instruction set whose kernels are in use.");
  m.def("cpu_supported_isas", &mnv2::cpu_supported_isas, "Names that MNV2_FUSED_CPU_ISA may have here, least first.");
  m.def(
      "pretend_caches", &mnv2::cpu_pretend_caches, py::arg("l1"), py::arg("l2"),
      "Lets planners see caches of other sizes, in bytes; 0 for the machine's own. Plans of whole networks that exist "
      "already stay as they are. For tests.");
  m.attr("BLOCK_FIELDS") = names_of(mnv2::kBlockFields);
  m.attr("DENSE_FIELDS") = names_of(mnv2::kDenseFields);
  m.attr("HEAD_FIELDS") = names_of(mnv2::kHeadFields);
  m.attr("UNIT_FIELDS") = names_of(mnv2::kUnitFields);
  m.def("cpu_plan", &cpu_plan, py::arg("x"), py::arg("block"), py::arg("threads"), py::arg("dtype") = "float32",
        py::arg("l1") = 0, py::arg("l2") = 0,
        "The tile plan of a block on this machine. x: n, h, w, c; block: BLOCK_FIELDS. l1 and l2 (bytes) replace the "
        "machine's caches if they are positive.");
  m.def("cpu_network_plan", &cpu_network_plan, py::arg("x"), py::arg("units"), py::arg("bounds"), py::arg("threads"),
        py::arg("dtype") = "float32", "The plan of the operator `network`, from the same texts.");
  m.def("cuda_plan", &cuda_plan, py::arg("x"), py::arg("block"), py::arg("dtype") = "float16",
        py::arg("device") = "sm_90", py::arg("exact") = false, py::arg("tile") = py::none(),
        "The plan of a block on a GPU. No GPU is needed. device: sm_80 (A100), sm_86 (A10) or sm_90 (H200). exact: "
        "float32 without tf32. Cycles are of one multiprocessor: of the whole launch, and the fewest that each part "
        "could take. memory_bytes: the traffic of the GPU's memory. tile: rows, columns and images of a tile, splits, "
        "whether chunks are expanded ahead, and rounds (0: the quickest), in place of the quickest.");
  m.def("cuda_network_plan", &cuda_network_plan, py::arg("x"), py::arg("units"), py::arg("bounds"),
        py::arg("dtype") = "float16", py::arg("device") = "sm_90", py::arg("exact") = false,
        "The plan of the operator `network` on a GPU, from the same texts. Each launch is as in cuda_plan.");
  m.def("cuda_device", &cuda_device, py::arg("name"), "The properties of a GPU that its plans depend on.");
  m.def("cuda_unfit", &cuda_unfit, py::arg("operator"), py::arg("x"), py::arg("fields"), py::arg("dtype"),
        py::arg("shared_block_bytes"),
        "Why an operator cannot run on a GPU, or None if it can. fields: the operator's integers. "
        "shared_block_bytes: the most shared memory of a thread block.");
  m.def(
      "crowded", &mnv2::crowded,
      "Whether CPU operators use the calling thread alone, because other work on its processors made several slower.");
  m.def(
      "parallel_loop_took",
      [](double took, double alone) {
        using Seconds = std::chrono::duration<double>;
        mnv2::parallel_loop_took(std::chrono::duration_cast<std::chrono::nanoseconds>(Seconds(took)),
                                 std::chrono::duration_cast<std::chrono::nanoseconds>(Seconds(alone)));
      },
      py::arg("took"), py::arg("alone"),
      "Tells crowded() the seconds of a loop on several threads, and those it takes on one thread. For tests.");
  m.def("watch_crowding", &mnv2::watch_crowding, py::arg("watch"),
        "Forgets all loops. Unless `watch`, crowded() stays false from now on. For tests.");
  m.attr("CHUNK") = mnv2::kChunk;
  m.def("limit_channels", &mnv2::limit_channels, py::arg("pixels"),
        "Sets the most pixels, at first CHANNELS_PIXELS, with which a block trains channel by channel. Returns what it "
        "was. For tests.");
  m.attr("CHANNELS_PIXELS") = mnv2::kChannelsPixels;
  m.attr("CHANNELS_PIXELS_EACH") = mnv2::kChannelsPixelsEach;
  m.attr("WORTH_SAVING") = mnv2::train::kWorthSaving;
  m.def("cpu_fma_peak", &mnv2::cpu_fma_peak,
        "Multiply-adds a second of one core on registers alone, in the instruction set in use (takes about 20 ms).");
  m.def("scratch_high_water", &mnv2::cpu_scratch_high_water,
        "Bytes of the largest scratch requests since the last reset, summed over threads.");
  m.def("reset_scratch_high_water", &mnv2::cpu_reset_scratch_high_water);
  py::class_<mnv2::SameObjects>(m, "SameObjects",
                                "Whether objects still have the types, and dicts the entries, that they had.")
      .def(py::init<const py::list&, const py::list&>(), py::arg("objects"), py::arg("dicts"))
      .def("holds", &mnv2::SameObjects::holds);
  py::enum_<mnv2::Watch>(m, "Watch", "What of a tensor is watched. Each member watches all that the one before does.")
      .value("PLACE", mnv2::Watch::kPlace, "Type, address, dtype, shape, strides, size of the storage.")
      .value("VERSION", mnv2::Watch::kVersion, "The version counter.")
      .value("CONTENTS", mnv2::Watch::kContents,
             "A fingerprint of a dense tensor on the CPU. Its version counts if the fingerprint is partial, unless it "
             "is an inference tensor.");
  py::class_<mnv2::SameTensors>(m, "SameTensors", "Whether tensors are what they were.")
      .def(py::init<const std::vector<std::pair<py::object, mnv2::Watch>>&>(), py::arg("tensors"),
           "`tensors`: each with its Watch. Raises RuntimeError if a storage holds fewer bytes than its tensor needs.")
      .def("holds", &mnv2::SameTensors::holds, "Reads no memory that a storage has given back.");
  m.def("check_alongside", &mnv2::check_alongside, py::arg("objects"), py::arg("tensors"),
        "Asks a SameObjects and a SameTensors whether they hold, in this thread's next CPU operator, while the other "
        "threads begin to compute.");
  m.def("forget", &mnv2::cpu_forget, py::arg("cache"),
        "Drops the weights that cached_* operators on the CPU packed for the cache of that name.");
  m.def("packings", &mnv2::cpu_packings, "How often cached_* operators on the CPU have packed weights.");
  m.def("check_held", &mnv2::check_held, "Whether both held; to be called after that operator.");
  bind_passes(m);
}
