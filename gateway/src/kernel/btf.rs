//! Where the running kernel keeps the fields that the BPF programs read, from its BTF
//! (Documentation/bpf/btf.rst; layouts in include/uapi/linux/btf.h).
use std::{collections::HashMap, fs, io, path::Path};

use common::map_values::Offsets;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Of a hundred thousand, those that are asked for.
const STRUCTURES: [&[u8]; 3] = [b"tcp_sock", b"sock", b"sk_psock"];

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;

/// Qualifiers and type definitions: a field of these types is one of the type they name.
const KINDS_THAT_NAME_ANOTHER: [u32; 5] = [8, 9, 10, 11, 18];

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can't read {VMLINUX}, which needs a kernel with CONFIG_DEBUG_INFO_BTF")]
    Read(#[source] io::Error),
    #[error("{VMLINUX} is not BTF of this machine's byte order")]
    Format,
    #[error("this kernel has no field {0}")]
    Missing(&'static str),
}

/// The offsets in the running kernel.
pub fn offsets() -> Result<Offsets, Error> {
    let bytes = fs::read(Path::new(VMLINUX)).map_err(Error::Read)?;
    let btf = Btf::parse(&bytes).ok_or(Error::Format)?;
    let field = |path: &'static str| btf.offset(path).ok_or(Error::Missing(path));
    Ok(Offsets {
        tcp_sock_copied_seq: field("tcp_sock.copied_seq")?,
        tcp_sock_rcv_nxt: field("tcp_sock.rcv_nxt")?,
        sock_user_data: field("sock.sk_user_data")?,
        sock_lock_owned: field("sock.sk_lock.owned")?,
        psock_refcnt: field("sk_psock.refcnt")?,
    })
}

/// A type section: where each type's record begins, and the wanted structures by name.
struct Btf<'a> {
    strings: &'a [u8],
    types: &'a [u8],
    starts: Vec<usize>,
    structures: HashMap<&'a [u8], u32>,
}

impl<'a> Btf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = |offset| word(bytes, offset);
        let header_length = header(4)? as usize;
        let section = |offset: u32, length: u32| {
            let start = header_length.checked_add(offset as usize)?;
            bytes.get(start..start.checked_add(length as usize)?)
        };
        let types = section(header(8)?, header(12)?)?;
        let strings = section(header(16)?, header(20)?)?;
        // Type 0 is void and has no record.
        let mut btf = Self { strings, types, starts: vec![usize::MAX], structures: HashMap::new() };
        let mut start = 0;
        while start < types.len() {
            let record = Record::at(types, start)?;
            if record.kind == KIND_STRUCT {
                let name = btf.name(record.name)?;
                if STRUCTURES.contains(&name) {
                    btf.structures.entry(name).or_insert(btf.starts.len() as u32);
                }
            }
            btf.starts.push(start);
            start += 12 + record.trailing_bytes();
        }
        Some(btf)
    }

    /// The offset in bytes of `structure.field.field`, whose members may be anonymous.
    fn offset(&self, path: &str) -> Option<u32> {
        let mut names = path.split('.');
        let mut id = *self.structures.get(names.next()?.as_bytes())?;
        let mut bits = 0;
        for name in names {
            let (offset, member) = self.member(id, name.as_bytes())?;
            bits += offset;
            id = member;
        }
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// A member's offset in bits and its type.
    fn member(&self, id: u32, wanted: &[u8]) -> Option<(u32, u32)> {
        let start = self.resolve(id)?;
        let record = Record::at(self.types, start)?;
        if record.kind != KIND_STRUCT && record.kind != KIND_UNION {
            return None;
        }
        for index in 0..record.count as usize {
            let at = start + 12 + 12 * index;
            let name = self.name(word(self.types, at)?)?;
            let member = word(self.types, at + 4)?;
            // With the flag a member's width stands in the upper byte.
            let mask = if record.flag { 0x00ff_ffff } else { u32::MAX };
            let offset = word(self.types, at + 8)? & mask;
            if name == wanted {
                return Some((offset, member));
            }
            if name.is_empty()
                && let Some((inner, member)) = self.member(member, wanted)
            {
                return Some((offset + inner, member));
            }
        }
        None
    }

    fn resolve(&self, mut id: u32) -> Option<usize> {
        // A chain of qualifiers is short; a longer one is a loop.
        for _ in 0..16 {
            let start = *self.starts.get(id as usize)?;
            let record = Record::at(self.types, start)?;
            if !KINDS_THAT_NAME_ANOTHER.contains(&record.kind) {
                return Some(start);
            }
            id = record.size_or_type;
        }
        None
    }

    fn name(&self, offset: u32) -> Option<&'a [u8]> {
        self.strings.get(offset as usize..)?.split(|&byte| byte == 0).next()
    }
}

struct Record {
    name: u32,
    kind: u32,
    count: u32,
    flag: bool,
    size_or_type: u32,
}

impl Record {
    fn at(types: &[u8], start: usize) -> Option<Self> {
        let info = word(types, start.checked_add(4)?)?;
        Some(Self {
            name: word(types, start)?,
            kind: (info >> 24) & 0x1f,
            count: info & 0xffff,
            flag: info >> 31 == 1,
            size_or_type: word(types, start + 8)?,
        })
    }

    fn trailing_bytes(&self) -> usize {
        let count = self.count as usize;
        match self.kind {
            KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
            KIND_ARRAY => 12,
            KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * count,
            KIND_ENUM | KIND_FUNC_PROTO => 8 * count,
            _ => 0,
        }
    }
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_every_field() {
        let offsets = offsets().unwrap();
        // struct sock begins with its common part, so no field of it can stand at the front.
        assert!(offsets.sock_user_data > 0 && offsets.sock_lock_owned > 0);
        assert_ne!(offsets.tcp_sock_copied_seq, offsets.tcp_sock_rcv_nxt);
        assert!(offsets.tcp_sock_copied_seq > offsets.sock_user_data);
    }

    #[test]
    fn noise_and_every_prefix_are_refused_without_a_panic() {
        let bytes = fs::read(VMLINUX).unwrap();
        for end in (0..4096).chain([bytes.len() / 2, bytes.len() - 1]) {
            assert!(Btf::parse(&bytes[..end]).is_none_or(|btf| btf.offset("no.field").is_none()));
        }
        assert!(Btf::parse(b"\x9f\xeb\x01\x00 and then noise that is long enough").is_none());
    }
}
