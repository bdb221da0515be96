// Makes the host code of one block.
#pragma once

#include <optional>
#include <vector>

#include "kvm/soft/translate/copy.hpp"
#include "kvm/soft/translate/translator.hpp"

namespace lodge::kvm::soft {

class UnitEmitter {
 public:
  UnitEmitter(Translator& translator, Translation& translation, uint8_t* begin, uint8_t* end) noexcept;
  // False: the block is not one for the translator. Fills begin, end, sites, exits and faults.
  bool emit() noexcept;

 private:
  // --- what is known at the point of emission
  struct Flow {
    bool native_flags, stored_flags;  // where the arithmetic flags are; neither: dead
    uint8_t level;
    int32_t rsp;  // what has been added to the guest's RSP and is not in Cpu::gpr yet
  };
  // Accesses off one base register within a page, by one look-up: scratch0 holds the host address of
  // base + disp until the op `last` is done.
  struct Run {
    bool active = false;
    uint8_t base = gpr_zero;
    unsigned last = 0;
    int64_t disp = 0;
    int64_t moved = 0;         // what has been added to the base since
    std::vector<Site*> sites;  // of the look-up, and of instructions that may fault natively
  };
  struct Access {
    uint8_t base = gpr_zero, index = gpr_zero, scale = 0, segment = seg_none;
    int64_t disp = 0;
    unsigned size = 0;
    bool write = false, narrow = false;
    uint8_t bit_register = gpr_zero;
  };
  // Where an access is: [scratch0 + disp].
  struct Place {
    int64_t disp;
    Site* site;  // of a look-up for this access alone, which is to be closed; null: a run's
  };
  struct Stub {
    uint8_t* displacement;  // of the jump to it; null: an exit's
    Stubs::Call call;
    void* argument;
    Boundary boundary;
  };

  bool analyse_block() noexcept;
  void find_live_flags() noexcept;
  void emit_one(unsigned n) noexcept;
  void emit_kind(const Instruction& i, unsigned n) noexcept;
  void emit_stubs() noexcept;

  void emit_copy(const Instruction& i, unsigned n) noexcept;
  void emit_memory(const Instruction& i, unsigned n) noexcept;
  void emit_address(const Instruction& i) noexcept;
  void emit_push(const Instruction& i, unsigned n) noexcept;
  void emit_push_memory(const Instruction& i, unsigned n) noexcept;
  void emit_system(const Instruction& i, unsigned n) noexcept;
  void emit_swap_gs() noexcept;
  void emit_read_segment(const Instruction& i) noexcept;
  void emit_set_if(unsigned n) noexcept;
  void emit_read_tsc(const Instruction& i) noexcept;
  void emit_serialize(unsigned n) noexcept;
  void change_system_flag(uint64_t bit, bool on) noexcept;
  void emit_push_flags(const Instruction& i, unsigned n) noexcept;
  void emit_pop_flags(const Instruction& i, unsigned n) noexcept;
  void emit_bit_test(const Instruction& i, unsigned n) noexcept;
  void emit_load_control(const Instruction& i, unsigned n) noexcept;
  void emit_string(const Instruction& i, unsigned n) noexcept;
  void emit_pop(const Instruction& i, unsigned n) noexcept;
  void emit_leave(const Instruction& i, unsigned n) noexcept;

  void emit_call(const Instruction& i, unsigned n) noexcept;
  void emit_call_indirect(const Instruction& i, unsigned n) noexcept;
  void refuse_odd_target(unsigned n) noexcept;
  uint8_t* jump_if_odd() noexcept;
  void emit_ret(const Instruction& i, unsigned n) noexcept;
  void emit_jump_indirect(const Instruction& i, unsigned n) noexcept;
  void emit_jump(const Instruction& i, unsigned n) noexcept;
  void emit_branch(const Instruction& i, unsigned n) noexcept;
  void emit_loop(const Instruction& i) noexcept;
  void leave_if(unsigned condition, int64_t offset) noexcept;
  void emit_complex(unsigned n) noexcept;

  // The memory operand, with what has been added to RSP meanwhile.
  Access operand(const Instruction& i, unsigned size, int32_t rsp_part) const noexcept;
  Access stack_access(int64_t disp, bool write) const noexcept;
  // The one access of an instruction that may be part of a run; nothing: it has none, or more.
  std::optional<Access> access_of(const Instruction& i, int32_t rsp_part) const noexcept;
  Place reach(const Instruction& i, unsigned n) noexcept;
  void plan_run(const Access& access, unsigned n) noexcept;
  bool spares_run(const Instruction& i, uint8_t base, int32_t stack) const noexcept;
  // Afterwards scratch0 is the host address; takes scratch1 and the flags.
  Site& look_up(const Access& access, unsigned n, unsigned last) noexcept;
  Site& look_up_alone(const Access& access, unsigned n) noexcept;
  void effective_address(const Access& access) noexcept;
  void add_segment(const Access& access, Site& site) noexcept;
  void push_return_address(const Instruction& i, int64_t disp) noexcept;

  bool wants_native_flags(const Instruction& i, unsigned n) const noexcept;
  void need_native_flags(const Instruction& i, unsigned n) noexcept;
  void store_flags() noexcept;
  void commit_rsp() noexcept;
  void raise_level(uint8_t level) noexcept;
  void check_requests(unsigned n) noexcept;
  bool bind(const Instruction& i, Standins& standins) noexcept;
  void write_back(const Instruction& i, const Standins& standins) noexcept;
  // scratch register <- value of a guest register
  void load_guest(unsigned scratch, unsigned guest) noexcept;
  void exit_to(int64_t offset) noexcept;
  DirectExit& new_exit(int64_t offset) noexcept;
  void take_slot(DirectExit& exit) noexcept;
  void emit_entry() noexcept;
  void place_exit(DirectExit& exit, const uint8_t* stub) noexcept;
  void exit_indirect(unsigned n, int32_t rsp_change) noexcept;
  void count(int64_t counter, int64_t amount) noexcept;
  void count_straight(unsigned n) noexcept;
  bool follows(unsigned n) const noexcept;
  bool leads_on(unsigned n) const noexcept;
  Boundary boundary() const noexcept;
  bool in_page(int64_t offset) const noexcept;
  bool moves_rsp(const Instruction& i, int32_t& amount) const noexcept;
  bool moves(unsigned reg, const Instruction& i, int32_t& amount) const noexcept;
  Site& new_site(unsigned n, unsigned last) noexcept;
  Site& new_fault(unsigned n, unsigned last) noexcept;
  Site& interpret_if(uint8_t* jump, unsigned n) noexcept;
  // The interpreter's way out of a site joins translated code here.
  void close(Site& site) noexcept;
  void note_flags(const Instruction& i) noexcept;
  void finish_run(unsigned n) noexcept;
  Stub& add_stub(uint8_t* displacement, Stubs::Call call, void* argument, Boundary boundary) noexcept;

  const Cpu& cpu() const noexcept { return translator_.cpu_; }
  const Stubs& common_stubs() const noexcept { return translator_.stubs_; }

  Translator& translator_;
  Translation& t_;
  const DecodedBlock& block_;
  const StateOffsets& o_;
  Emitter e_;
  const bool wide_;     // 64-bit code
  const int32_t word_;  // what a push takes: 8 or 4 bytes
  const bool counts_;
  const int64_t start_;  // offset of the block in its page
  Flow flow_;
  Run run_;
  std::vector<Instruction>& code_;
  std::vector<Flags> live_;  // before each instruction, and at the end
  std::vector<Stub> stubs_;
  unsigned counted_ = 0;      // instructions before this one are counted
  bool wants_check_ = false;  // some branch goes back: look at the request word
  bool ended_ = false;        // the last instruction was a branch
  bool failed_ = false;
};

}  // namespace lodge::kvm::soft
