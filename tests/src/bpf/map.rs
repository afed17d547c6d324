//! A map, by its ID: its entries and what it looks like from outside.
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use super::{BPF_MAP_GET_FD_BY_ID, bpf, by_id, object_info, short_name};

const BPF_MAP_CREATE: i32 = 0;
const BPF_MAP_LOOKUP_ELEM: i32 = 1;
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_MAP_DELETE_ELEM: i32 = 3;
const BPF_MAP_GET_NEXT_KEY: i32 = 4;

const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

const MAP_TYPE_ARRAY: u32 = 2;

pub struct Map {
    pub name: String,
    pub kind: u32,
    pub key_bytes: usize,
    pub value_bytes: usize,
    pub max_entries: usize,
    /// Whether the kernel knows the names of the key's fields.
    pub has_types: bool,
    fd: OwnedFd,
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_bytes: u32,
    value_bytes: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    value_struct: u32,
    device: u64,
    inode: u64,
    btf: u32,
    key_type: u32,
    value_type: u32,
}

impl Map {
    pub fn by_id(id: u32) -> io::Result<Self> {
        let fd = by_id(BPF_MAP_GET_FD_BY_ID, id)?;
        let mut info = MapInfo::default();
        object_info(&fd, &mut info)?;
        Ok(Self {
            name: short_name(&info.name),
            kind: info.kind,
            key_bytes: info.key_bytes as usize,
            value_bytes: info.value_bytes as usize,
            max_entries: info.max_entries as usize,
            has_types: info.key_type != 0,
            fd,
        })
    }

    /// An array of 64-bit counters.
    pub fn counters(entries: u32) -> io::Result<Self> {
        #[repr(C)]
        struct Create {
            kind: u32,
            key_bytes: u32,
            value_bytes: u32,
            max_entries: u32,
        }
        let fd = bpf(
            BPF_MAP_CREATE,
            &mut Create { kind: MAP_TYPE_ARRAY, key_bytes: 4, value_bytes: 8, max_entries: entries },
        )?;
        // SAFETY: the kernel has just made this file and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            name: String::new(),
            kind: MAP_TYPE_ARRAY,
            key_bytes: 4,
            value_bytes: 8,
            max_entries: entries as usize,
            has_types: false,
            fd,
        })
    }

    pub fn counter(&self, index: u32) -> u64 {
        let value = self.value(&index.to_ne_bytes()).expect("an array has all its entries");
        u64::from_ne_bytes(value.try_into().expect("a counter has 64 bits"))
    }

    pub fn value(&self, key: &[u8]) -> io::Result<Vec<u8>> {
        let mut value = vec![0; self.value_bytes];
        self.element(BPF_MAP_LOOKUP_ELEM, key, value.as_mut_ptr().addr(), 0)?;
        Ok(value)
    }

    /// Adds an entry; an error if there is one already or no room.
    pub fn add(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.element(BPF_MAP_UPDATE_ELEM, key, value.as_ptr().addr(), BPF_NOEXIST)
    }

    /// Changes an entry; an error if there is none.
    pub fn change(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.element(BPF_MAP_UPDATE_ELEM, key, value.as_ptr().addr(), BPF_EXIST)
    }

    pub fn remove(&self, key: &[u8]) -> io::Result<()> {
        self.element(BPF_MAP_DELETE_ELEM, key, 0, 0)
    }

    fn element(&self, command: i32, key: &[u8], value: usize, flags: u64) -> io::Result<()> {
        assert_eq!(key.len(), self.key_bytes, "{}", self.name);
        let map = self.fd.as_raw_fd().cast_unsigned();
        let key = key.as_ptr().addr() as u64;
        bpf(command, &mut Element { map, padding: 0, key, value: value as u64, flags }).map(drop)
    }

    pub fn raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// All keys; a map that changes meanwhile may show one twice or not at all.
    pub fn keys(&self) -> Vec<Vec<u8>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        let mut next = vec![0u8; self.key_bytes];
        loop {
            let mut request = Element {
                map: self.fd.as_raw_fd().cast_unsigned(),
                padding: 0,
                key: keys.last().map_or(0, |key| key.as_ptr().addr() as u64),
                value: next.as_mut_ptr().addr() as u64,
                flags: 0,
            };
            if bpf(BPF_MAP_GET_NEXT_KEY, &mut request).is_err() {
                return keys;
            }
            keys.push(next.clone());
        }
    }
}

#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
