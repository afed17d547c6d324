//! The bpf(2) calls that tests make themselves: listing objects, reading and changing maps, loading assembled programs.
use std::{
    ffi::c_void,
    fs, io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use nix::libc;

pub use map::Map;

mod map;

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_GET_FD_BY_ID: i32 = 13;
const BPF_MAP_GET_FD_BY_ID: i32 = 14;
const BPF_OBJ_GET_INFO_BY_FD: i32 = 15;
const BPF_LINK_GET_FD_BY_ID: i32 = 30;
const BPF_LINK_DETACH: i32 = 34;

pub const MAP_TYPE_HASH: u32 = 1;
pub const MAP_TYPE_LRU_HASH: u32 = 9;
pub const MAP_TYPE_SOCKHASH: u32 = 18;
const PROG_TYPE_SCHED_CLS: u32 = 3;

/// One `bpf_insn`.
pub type Instruction = [u8; 8];

/// Instructions, as the kernel's `filter.h` names them.
pub mod assemble {
    use super::Instruction;

    pub const R0: u8 = 0;
    pub const R1: u8 = 1;
    pub const R2: u8 = 2;
    pub const R3: u8 = 3;
    pub const R4: u8 = 4;
    pub const R6: u8 = 6;
    pub const R10: u8 = 10;

    const fn raw(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
        let [o0, o1] = offset.to_le_bytes();
        let [i0, i1, i2, i3] = immediate.to_le_bytes();
        [code, source << 4 | destination, o0, o1, i0, i1, i2, i3]
    }

    pub const fn set(register: u8, value: i32) -> Instruction {
        raw(0xb7, register, 0, 0, value)
    }

    pub const fn copy(to: u8, from: u8) -> Instruction {
        raw(0xbf, to, from, 0, 0)
    }

    pub const fn add(register: u8, value: i32) -> Instruction {
        raw(0x07, register, 0, 0, value)
    }

    /// The low bits of a register that a division leaves.
    pub const fn modulo(register: u8, value: i32) -> Instruction {
        raw(0x97, register, 0, 0, value)
    }

    pub const fn load_u32(to: u8, base: u8, offset: i16) -> Instruction {
        raw(0x61, to, base, offset, 0)
    }

    pub const fn load_u8(to: u8, base: u8, offset: i16) -> Instruction {
        raw(0x71, to, base, offset, 0)
    }

    pub const fn store_u32(base: u8, offset: i16, value: i32) -> Instruction {
        raw(0x62, base, 0, offset, value)
    }

    /// Adds a register to eight bytes of memory, atomically.
    pub const fn atomic_add(base: u8, offset: i16, source: u8) -> Instruction {
        raw(0xdb, base, source, offset, 0)
    }

    /// The jump's distance counts from the instruction behind it.
    pub const fn jump_if_equal(register: u8, value: i32, distance: i16) -> Instruction {
        raw(0x15, register, 0, distance, value)
    }

    pub const fn jump_if_not_equal(register: u8, value: i32, distance: i16) -> Instruction {
        raw(0x55, register, 0, distance, value)
    }

    pub const fn jump_if_at_least(register: u8, value: i32, distance: i16) -> Instruction {
        raw(0x35, register, 0, distance, value)
    }

    pub const fn call(helper: i32) -> Instruction {
        raw(0x85, 0, 0, 0, helper)
    }

    pub const fn exit() -> Instruction {
        raw(0x95, 0, 0, 0, 0)
    }

    /// Two instructions' room.
    pub const fn load_map(register: u8, fd: i32) -> [Instruction; 2] {
        [raw(0x18, register, 1, 0, fd), raw(0, 0, 0, 0, 0)]
    }
}

/// Programs, maps and links that a process holds open, by id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    pub programs: Vec<u32>,
    pub maps: Vec<u32>,
    pub links: Vec<u32>,
}

impl Objects {
    pub fn of_process(pid: i32) -> Self {
        let mut objects = Self::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let field = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name))?;
                line.trim().parse::<u32>().ok()
            };
            match (field("link_id:"), field("prog_id:"), field("map_id:")) {
                // A link's description names its program too.
                (Some(link), program, _) => {
                    objects.links.push(link);
                    objects.programs.extend(program);
                }
                (None, Some(program), _) => objects.programs.push(program),
                (None, None, Some(map)) => objects.maps.push(map),
                (None, None, None) => {}
            }
        }
        objects
    }

    pub fn is_empty(&self) -> bool {
        self.programs.is_empty() && self.maps.is_empty() && self.links.is_empty()
    }

    /// Which of them the kernel still has, each with its kind.
    pub fn alive(&self) -> Vec<String> {
        let kinds = [
            ("program", BPF_PROG_GET_FD_BY_ID, &self.programs),
            ("map", BPF_MAP_GET_FD_BY_ID, &self.maps),
            ("link", BPF_LINK_GET_FD_BY_ID, &self.links),
        ];
        let mut alive = Vec::new();
        for (kind, command, ids) in kinds {
            let living = ids.iter().filter(|&&id| by_id(command, id).is_ok());
            alive.extend(living.map(|id| format!("{kind} {id}")));
        }
        alive
    }

    /// The map of this name; an error if there is none.
    pub fn map(&self, name: &str) -> io::Result<Map> {
        let maps = self.maps.iter().filter_map(|&id| Map::by_id(id).ok());
        maps.into_iter().find(|map| map.name == name).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The maps whose entries come and go, with how many each holds.
    pub fn entries(&self) -> Vec<(String, usize)> {
        let mut counts = Vec::new();
        for &id in &self.maps {
            let Ok(map) = Map::by_id(id) else { continue };
            if [MAP_TYPE_HASH, MAP_TYPE_LRU_HASH, MAP_TYPE_SOCKHASH].contains(&map.kind) {
                counts.push((map.name.clone(), map.keys().len()));
            }
        }
        counts.sort();
        counts.dedup();
        counts
    }
}

/// Takes a program off its hook, as an administrator might.
pub fn detach_link(id: u32) -> io::Result<()> {
    let link = by_id(BPF_LINK_GET_FD_BY_ID, id)?;
    bpf(BPF_LINK_DETACH, &mut link.as_raw_fd().cast_unsigned()).map(drop)
}

/// The name that a program was loaded with; empty if it has none.
pub fn program_name(id: u32) -> io::Result<String> {
    /// The beginning of `struct bpf_prog_info`.
    #[repr(C)]
    #[derive(Default)]
    struct ProgramInfo {
        kind: u32,
        id: u32,
        tag: [u8; 8],
        lengths: [u32; 2],
        instructions: [u64; 2],
        load_time: u64,
        created_by: u32,
        map_ids_length: u32,
        map_ids: u64,
        name: [u8; 16],
    }
    let mut info = ProgramInfo::default();
    object_info(&by_id(BPF_PROG_GET_FD_BY_ID, id)?, &mut info)?;
    Ok(short_name(&info.name))
}

fn short_name(name: &[u8]) -> String {
    String::from_utf8_lossy(name.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

fn object_info<T>(object: &OwnedFd, info: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Request {
        fd: u32,
        length: u32,
        address: u64,
    }
    let mut request = Request {
        fd: object.as_raw_fd().cast_unsigned(),
        length: size_of::<T>() as u32,
        address: (&raw mut *info).addr() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut request).map(drop)
}

/// Loads a traffic control classifier.
pub fn load_classifier(name: &str, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_bytes: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    let mut log = vec![0u8; 1 << 16];
    let mut short_name = [0; 16];
    for (to, from) in short_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let mut request = Load {
        kind: PROG_TYPE_SCHED_CLS,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Dual MIT/GPL".as_ptr().addr() as u64,
        log_level: 1,
        log_bytes: log.len() as u32,
        log: log.as_mut_ptr().addr() as u64,
        kernel_version: 0,
        flags: 0,
        name: short_name,
    };
    let fd = bpf(BPF_PROG_LOAD, &mut request).map_err(|error| {
        let log = String::from_utf8_lossy(&log);
        io::Error::new(error.kind(), format!("{name}: {error}\n{}", log.trim_end_matches('\0')))
    })?;
    // SAFETY: the kernel has just made this file and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn by_id(command: i32, id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct ById {
        id: u32,
        next_id: u32,
        open_flags: u32,
    }
    let fd = bpf(command, &mut ById { id, next_id: 0, open_flags: 0 })?;
    // SAFETY: the kernel has just made this file and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    let pointer = (&raw mut *attributes).cast::<c_void>();
    // SAFETY: the attributes are a prefix of `union bpf_attr` of the size given, and every address in them points
    // to memory that lives until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, mem::size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
