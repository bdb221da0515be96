#include "kvm/soft/translate/stubs.hpp"

#include <xbyak/xbyak.h>

#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/translate/emitter.hpp"
#include "kvm/soft/translate/translator.hpp"

namespace lodge::kvm::soft {
namespace {

namespace x = Xbyak;

int64_t distance(const Cpu& cpu, const void* member) noexcept {
  return static_cast<const uint8_t*>(member) - reinterpret_cast<const uint8_t*>(&cpu);
}

// What the stubs call, on the host's stack.
template <class Thing, const void* (Translator::*Method)(Thing&) noexcept>
const void* call_translator(Translator* translator, Thing* thing) noexcept {
  return (translator->*Method)(*thing);
}

class Generator : public x::CodeGenerator {
 public:
  Generator(uint8_t* code, const StateOffsets& offsets)
      : x::CodeGenerator(Stubs::max_size, code), o_(offsets) {}

  x::Address at(int64_t offset) { return ptr[rsp + static_cast<int>(offset)]; }

  void save_low() {
    for (int i = 0; i < 16; ++i) vector_store(i);
    stmxcsr(at(o_.fx + 24));
    ldmxcsr(at(o_.default_mxcsr));
  }
  // Destroys flags. With something in the upper halves of registers, even zeros that were loaded there, each
  // SSE instruction merges its result with what its destination held: chains of dependencies that the guest's
  // program has not. So what is zero is made so by VZEROUPPER.
  void load_low() {
    ldmxcsr(at(o_.fx + 24));
    x::Label high, done;
    if (simd::host().avx) {
      test_upper_halves();
      jnz(high, T_NEAR);
      for (int i = 0; i < 16; ++i) vmovaps(x::Xmm(i), home(i));
      vzeroupper();
      jmp(done, T_NEAR);
    }
    L(high);
    for (int i = 0; i < 16; ++i) vector_load(i);
    L(done);
  }
  // ZF: they are all zero at home. Takes registers 0 to 3.
  void test_upper_halves() {
    if (simd::host().avx512) {
      vmovdqa64(zmm0, home(0));
      for (int i = 1; i < 16; ++i) vporq(zmm0, zmm0, home(i));
      vextracti64x4(ymm1, zmm0, 1);
      vextracti128(xmm2, ymm0, 1);
      vextracti128(xmm3, ymm1, 1);
      vpor(xmm1, xmm1, xmm2);
      vpor(xmm1, xmm1, xmm3);
    } else {
      vmovaps(ymm0, home(0));
      for (int i = 1; i < 16; ++i) vorps(ymm0, ymm0, home(i));
      vextractf128(xmm1, ymm0, 1);
    }
    vptest(xmm1, xmm1);
  }
  void save_high() {
    if (!simd::host().avx512) return;
    for (int i = 16; i < 32; ++i) vector_store(i);
    for (int i = 0; i < 8; ++i) kmovq(at(o_.k + 8 * i), x::Opmask(i));
  }
  void load_high() {
    if (!simd::host().avx512) return;
    for (int i = 16; i < 32; ++i) vector_load(i);
    for (int i = 0; i < 8; ++i) kmovq(x::Opmask(i), at(o_.k + 8 * i));
  }
  // The image's XMM area is unused; its MXCSR is the guest's.
  void save_x87() {
    fx(0);
    fninit();
    // FOP, FIP and FDP would name host addresses.
    mov(word[rsp + static_cast<int>(o_.fx + 6)], 0);
    mov(qword[rsp + static_cast<int>(o_.fx + 8)], 0);
    mov(qword[rsp + static_cast<int>(o_.fx + 16)], 0);
  }
  void load_x87() { fx(1); }

  void save_level(unsigned level) {
    if (level >= 3) save_x87();
    if (level >= 2) save_high();
    if (level >= 1) {
      save_low();
      if (simd::host().avx) vzeroupper();
    }
  }
  // FXRSTOR loads XMM registers too: x87 first.
  void load_level(unsigned level) {
    if (level >= 3) load_x87();
    if (level >= 2) load_high();
    if (level >= 1) load_low();
  }
  void raise_level(unsigned from, unsigned to) {
    mov(r11, rax);
    lahf();
    seto(al);
    mov(word[rsp + static_cast<int>(o_.target)], ax);
    if (to == 3) {
      if (from >= 1) save_low();
      if (from >= 2) save_high();
      load_level(3);
    } else {
      if (to == 2 && from < 2) load_high();
      if (from < 1) load_low();
    }
    restore_flags(o_.target);
    mov(rax, r11);
    jmp(qword[rsp + static_cast<int>(o_.resume)]);
  }

  // From LAHF's and SETO's bytes; takes EAX.
  void restore_flags(int64_t word_offset) {
    movzx(eax, word[rsp + static_cast<int>(word_offset)]);
    add(al, 127);
    sahf();
  }
  void save_registers() {
    for (int i = 0; i < 16; ++i)
      if (!lives_in_memory(static_cast<unsigned>(i)))
        mov(at(o_.of_gpr(static_cast<unsigned>(i))), x::Reg64(i));
  }
  void load_registers() {
    for (int i = 1; i < 16; ++i)
      if (!lives_in_memory(static_cast<unsigned>(i)))
        mov(x::Reg64(i), at(o_.of_gpr(static_cast<unsigned>(i))));
    mov(rax, at(o_.of_gpr(0)));
  }

  void call_stub(const void* function, Translator*, Boundary boundary, int64_t translator) {
    save_registers();
    if (boundary.native_flags) {
      lahf();
      seto(al);
      mov(word[rsp + static_cast<int>(o_.arith)], ax);
    }
    save_level(boundary.level);
    mov(rbx, rsp);
    mov(rdi, at(translator));
    mov(rsi, r10);
    mov(rsp, at(o_.host_rsp));
    mov(rax, reinterpret_cast<size_t>(function));
    call(rax);
    mov(rsp, rbx);
    jmp(rax);
  }
  void restore_stub(Boundary boundary) {
    load_level(boundary.level);
    if (boundary.native_flags) restore_flags(o_.arith);
    load_registers();
    jmp(qword[rsp + static_cast<int>(o_.resume)]);
  }
  void enter_stub() {
    for (const x::Reg64& reg : {rbx, rbp, r12, r13, r14, r15}) push(reg);
    sub(rsp, 8);
    mov(ptr[rdi + static_cast<int>(o_.host_rsp)], rsp);
    mov(rsp, rdi);
    jmp(rsi);
  }
  void leave_stub() {
    mov(rsp, at(o_.host_rsp));
    add(rsp, 8);
    for (const x::Reg64& reg : {r15, r14, r13, r12, rbp, rbx}) pop(reg);
    ret();
  }

 private:
  x::Address home(int i) { return at(o_.zmm + 64 * i); }
  void vector_store(int i) {
    if (simd::host().avx512)
      vmovdqa64(home(i), x::Zmm(i));
    else if (simd::host().avx)
      vmovaps(home(i), x::Ymm(i));
    else
      movaps(home(i), x::Xmm(i));
  }
  void vector_load(int i) {
    if (simd::host().avx512)
      vmovdqa64(x::Zmm(i), home(i));
    else if (simd::host().avx)
      vmovaps(x::Ymm(i), home(i));
    else
      movaps(x::Xmm(i), home(i));
  }
  // FXSAVE64 (0) or FXRSTOR64 (1) of the image, which Xbyak lacks: REX.W 0F AE /n with [rsp + disp32].
  void fx(unsigned n) {
    db(0x48), db(0x0f), db(0xae), db(static_cast<uint8_t>(0x84 | n << 3)), db(0x24);
    dd(static_cast<uint32_t>(o_.fx));
  }

  const StateOffsets& o_;
};

}  // namespace

StateOffsets::StateOffsets(const Cpu& cpu, const TranslatorArea& a) noexcept
    : gpr(distance(cpu, cpu.gpr.data())),
      arith(distance(cpu, &cpu.arith)),
      rip(distance(cpu, &cpu.rip)),
      request(distance(cpu, &cpu.request)),
      zmm(distance(cpu, cpu.vector.zmm.data())),
      k(distance(cpu, cpu.vector.k.data())),
      fx(distance(cpu, cpu.vector.fx.data())),
      segment_base(distance(cpu, &cpu.segment[0].base)),
      tlb(distance(cpu, cpu.tlb_sets.data())),
      area(distance(cpu, &a)),
      host_rsp(distance(cpu, &a.host_rsp)),
      resume(distance(cpu, &a.resume)),
      page(distance(cpu, &a.page)),
      target(distance(cpu, &a.target)),
      instructions(distance(cpu, &a.instructions)),
      lookups(distance(cpu, &a.lookups)),
      default_mxcsr(distance(cpu, &a.default_mxcsr)),
      jump(distance(cpu, a.jump.data())),
      slot(distance(cpu, a.slot.data())),
      system_flags(distance(cpu, &cpu.system_flags)),
      selector(distance(cpu, &cpu.segment[0].selector)),
      kernel_gs_base(distance(cpu, &cpu.msr.kernel_gs_base)),
      tsc_offset(distance(cpu, &a.tsc_offset)),
      event_waits(distance(cpu, &a.event_waits)),
      tsc_aux(distance(cpu, &cpu.msr.tsc_aux)),
      heat(distance(cpu, a.heat.data())) {}

Stubs::Stubs(uint8_t* code, const StateOffsets& state_offsets) : offsets(state_offsets) {
  Generator g(code, offsets);
  const int64_t translator = offsets.area + static_cast<int64_t>(offsetof(TranslatorArea, translator));
  const void* const functions[calls] = {
      reinterpret_cast<const void*>(&call_translator<Site, &Translator::on_slow_access>),
      reinterpret_cast<const void*>(&call_translator<Site, &Translator::on_complex>),
      reinterpret_cast<const void*>(&call_translator<Site, &Translator::on_request>),
      reinterpret_cast<const void*>(&call_translator<DirectExit, &Translator::on_exit>),
      reinterpret_cast<const void*>(&call_translator<Site, &Translator::on_indirect>),
      reinterpret_cast<const void*>(&call_translator<Site, &Translator::on_hot>)};
  const auto here = [&] {
    g.align(16);
    return g.getCurr();
  };
  for (unsigned c = 0; c < calls; ++c)
    for (unsigned b = 0; b < Boundary::count; ++b) {
      call[c][b] = here();
      g.call_stub(functions[c], nullptr, Boundary::from(b), translator);
    }
  for (unsigned b = 0; b < Boundary::count; ++b) {
    restore[b] = here();
    g.restore_stub(Boundary::from(b));
  }
  for (unsigned from = 0; from < 3; ++from)
    for (unsigned to = from + 1; to < 4; ++to) {
      raise[from][to] = here();
      g.raise_level(from, to);
    }
  leave = here();
  g.leave_stub();
  enter = reinterpret_cast<void (*)(Cpu*, const void*)>(const_cast<uint8_t*>(here()));
  g.enter_stub();
  end = here();
}

}  // namespace lodge::kvm::soft
