//! Takes values off the front of a message; short and trailing bytes are both errors.
use crate::DecodeError;

pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let missing = N.saturating_sub(self.0.len());
        let (value, rest) = self.0.split_first_chunk().ok_or(DecodeError::Short { missing })?;
        self.0 = rest;
        Ok(*value)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.take().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.take().map(u64::from_le_bytes)
    }

    pub(crate) fn zeros<const N: usize>(&mut self) -> Result<(), DecodeError> {
        if self.take::<N>()? == [0; N] { Ok(()) } else { Err(DecodeError::Padding) }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let missing = count.saturating_sub(self.0.len());
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(DecodeError::Short { missing })?;
        self.0 = rest;
        Ok(bytes)
    }

    /// All that is left, if that is no more than so much.
    pub(crate) fn rest(&mut self, bytes_max: usize) -> Result<&'a [u8], DecodeError> {
        match self.0.len().checked_sub(bytes_max) {
            None | Some(0) => Ok(std::mem::take(&mut self.0)),
            Some(excess) => Err(DecodeError::Trailing(excess)),
        }
    }

    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.0.len())) }
    }
}
